"""A sweep file, with what the command line adds to it, as a typed `Sweep`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fl_privacy.component import ComponentError, describe
from fl_privacy.sweep.filling import CLIENTS, FROM_TRAINED
from fl_privacy.sweep.grid import DefenseLine, Sweep
from fl_privacy.sweep.offline import Attack, Measure
from fl_privacy.threat_model import ThreatModel

FULL = "full"
"""The table of changes that ``--full`` makes."""

TABLES = ("run", "train", "record")

Model = TypeVar("Model", bound=BaseModel)


class SweepError(ValueError):
    """A sweep file, or a folder of one, that cannot be used."""


def read_sweep(path: Path, *, pairs: Sequence[str] = (), full: bool = False) -> Sweep:
    """The sweep in a TOML file, changed by its own table ``[full]`` and by ``KEY=VALUE`` pairs.

    Raises:
        SweepError: the file is missing or not TOML, or a pair is none.
        ComponentError: an unknown or wrong setting, in ``[full]`` too; the message names it.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SweepError(f"cannot read {path}: {error}; expected a TOML file") from None
    changes = document.pop(FULL, None)
    if full and changes is None:
        raise SweepError(f"{path} has no table [{FULL}], which --full would apply")
    small = sweep_of(changed(document, pairs))
    if changes is None:
        return small
    whole = sweep_of(changed(merged(document, changes), pairs))
    return whole if full else small


def sweep_of(document: Mapping[str, Any]) -> Sweep:
    """A sweep from the tables of its file, part by part, so that messages name the part.

    Raises:
        ComponentError: an unknown or wrong setting.
    """
    for name, table in _items(document.get("defenses")):
        _made(f"defenses.{name}", DefenseLine, table)
    attacks = document.get("attacks")
    for number, table in enumerate(attacks if isinstance(attacks, list) else [], start=1):
        if isinstance(table, dict):
            _made("threat_model", ThreatModel, table.get("threat_model", {}))
        _made(f"attacks, number {number}", Attack, table)
    measures = document.get("measures")
    for number, table in enumerate(measures if isinstance(measures, list) else [], start=1):
        _made(f"measures, number {number}", Measure, table)
    return _made("sweep file", Sweep, document)


def merged(base: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it: tables key by key, all else replaced.

    Raises:
        SweepError: the changes are not a table.
    """
    if not isinstance(changes, dict):
        raise SweepError(f"[{FULL}] must be a table of changes, got {changes!r}")
    result = dict(base)
    for key, value in changes.items():
        held = result.get(key)
        both = isinstance(held, dict) and isinstance(value, dict)
        result[key] = merged(held or {}, value) if both else value
    return result


def changed(document: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """``document`` with ``KEY=VALUE`` pairs, of ``[run]`` or, as ``train.KEY``, of another table.

    Raises:
        SweepError: a pair without ``=``.
    """
    result = dict(document)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SweepError(f"--set expects KEY=VALUE, got {pair!r}; such as --set lr=0.1")
        table, dot, rest = key.strip().partition(".")
        if not dot or table not in TABLES:
            table, rest = "run", key.strip()
        name = rest.replace("_", "-")
        old = {k: v for k, v in _items(result.get(table)) if str(k).replace("_", "-") != name}
        result[table] = {**old, name: _typed(name, value.strip())}
    return result


def _typed(name: str, value: str) -> str | int | bool:
    """Run settings read numbers from text by themselves; the sweep's own keys are typed here."""
    if name == CLIENTS and value.isdecimal():
        return int(value)
    if name == FROM_TRAINED and value in ("true", "false"):
        return value == "true"
    return value


def _items(table: Any) -> list[tuple[Any, Any]]:
    return list(table.items()) if isinstance(table, dict) else []


def _made(name: str, kind: type[Model], table: Any) -> Model:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ComponentError(describe(name, kind, error)) from None

"""The tables of run settings in a sweep file: what may stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationError

from fl_privacy.component import describe
from fl_privacy.settings import RunSettings, Scalar
from fl_privacy.sweep.filling import CLIENTS, FROM_TRAINED

OWN_KEYS: Mapping[str, str] = {
    "client-defense": "the tables [defenses.NAME] set it",
    "seed": "the list seeds sets it",
    "out-dir": "the option --out sets it",
    "resume": "a sweep resumes by itself",
    "initial-model": f"{FROM_TRAINED} = true in [record] sets it",
}
"""Settings that a sweep fills in, and where they come from."""


def hyphens(table: Any) -> Any:
    """Keys as the run config writes them."""
    if not isinstance(table, dict):
        return table
    return {str(key).replace("_", "-"): value for key, value in table.items()}


def known(table: dict[str, Scalar]) -> dict[str, Scalar]:
    """A table of run settings, each key and value checked.

    Raises:
        ValueError: a key that is no setting, that the sweep sets, or a wrong value.
    """
    for key, why in OWN_KEYS.items():
        if key in table:
            raise ValueError(f"{key} is not set here: {why}")
    clients = table.get(CLIENTS, 1)
    if isinstance(clients, bool) or not isinstance(clients, int) or clients < 1:
        raise ValueError(f"{CLIENTS}: expected a whole number above 0, got {clients!r}")
    settings = {k: v for k, v in table.items() if k not in (CLIENTS, FROM_TRAINED)}
    try:
        RunSettings.model_validate(settings)
    except ValidationError as error:
        if any(detail["loc"] for detail in error.errors()):
            raise ValueError(describe("run config", RunSettings, error)) from None
        # what settings need of each other is checked of each point, to which an axis may add it
    return table


def _without_start(table: dict[str, Scalar]) -> dict[str, Scalar]:
    if FROM_TRAINED in table:
        raise ValueError(f"{FROM_TRAINED} belongs in [record]")
    return table


Table = Annotated[dict[str, Scalar], BeforeValidator(hyphens), AfterValidator(known)]
"""Run settings by name, hyphens or underscores, and ``clients``."""

RunTable = Annotated[Table, AfterValidator(_without_start)]

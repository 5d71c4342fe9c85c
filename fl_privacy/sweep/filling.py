"""Texts of a sweep file in which ``{name}`` stands for a run setting, or an axis, of the point."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fl_privacy import component
from fl_privacy.component import ComponentError
from fl_privacy.settings import RunSettings, Scalar, parse_settings

CLIENTS, FROM_TRAINED = "clients", "from-trained"
"""Keys beside those of the run config: how many clients, and whose parameters to start from."""

STRENGTH = "strength"
"""Stands for the strength in the spec of a defense."""

AUXILIARY = "auxiliary"
"""Stands for the run's own dataset, the same but for ``held_out='auxiliary'``."""

PLACE = re.compile(r"\{([a-z][a-z0-9_-]*)\}")

SETTINGS = frozenset(name.replace("_", "-") for name in RunSettings.model_fields)


def places(text: str) -> frozenset[str]:
    """The names in braces, with hyphens."""
    return frozenset(_key(name) for name in PLACE.findall(text))


def _key(name: str) -> str:
    return name.replace("_", "-")


def filled(text: str, values: Mapping[str, Scalar]) -> str:
    """``text`` with what ``values`` hold; names that they lack stay, such as ``{split}``.

    Raises:
        ComponentError: `AUXILIARY` is asked of a dataset that holds no auxiliary people.
    """
    known = dict(values)
    if AUXILIARY in places(text) and "dataset" in values:
        known[AUXILIARY] = auxiliary_of(str(values["dataset"]))
    return PLACE.sub(lambda place: str(known.get(_key(place[1]), place[0])), text)


def auxiliary_of(dataset: str) -> str:
    """The spec of a dataset whose test split holds the adversary's people instead.

    Raises:
        ComponentError: it has no such people.
    """
    name = component.parse(dataset)[0]
    if "held_out" not in component.find("datasets", name).model_fields:
        raise ComponentError(
            f"{{{AUXILIARY}}} is a dataset's own auxiliary people, and {name} has no setting "
            f"held_out: write out what the adversary holds, such as npz(path='/data/others.npz')"
        )
    own = component.create("datasets", dataset, {"held_out": "auxiliary"})
    return component.spec_of("datasets", own)


def plain(table: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Of a table the settings of the run config alone."""
    return {key: value for key, value in table.items() if key in SETTINGS}


def settled(table: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The settings of ``table``, every text filled in; without what only stands in texts.

    Raises:
        ComponentError: a setting that is wrong once it is filled in.
    """
    values = {**_defaults(table), **table}
    known = (key for key in table if key in SETTINGS or key in (CLIENTS, FROM_TRAINED))
    texts = {key: table[key] for key in known}
    return {k: filled(v, values) if isinstance(v, str) else v for k, v in texts.items()}


def values_of(table: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """What stands for each name: the settings of a run as `settled`, defaults too, and the axes."""
    own = settled(table)
    return {**_defaults(own), **table, **own}


def _defaults(table: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return parse_settings(plain(table)).model_dump(by_alias=True)

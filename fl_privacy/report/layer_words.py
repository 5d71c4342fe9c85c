"""Measurements of layers in words and table cells, for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fl_privacy.layer_results import Measurement, Source
from fl_privacy.report.words import count, plain

WHOSE: dict[Source, str] = {
    "none": "Measured on the recorded updates alone",
    "auxiliary": "Measured on data that the adversary holds",
    "audit": "AUDIT: measured on the clients’ own samples, which no server has",
}
"""Whose samples a metric was measured on."""


@dataclass(frozen=True)
class Column:
    """One column of a table of layers."""

    title: str
    unit: str
    cells: tuple[str, ...]


def number(value: float) -> str:
    """Three significant digits; a dash for what is no number."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}".replace("-", "−")


def columns(found: Measurement) -> list[Column]:
    """What a metric says of each layer: its value, its uncertainty, then its own columns.

    Columns ``low`` and ``high`` become the interval of the value.
    """
    others = {n: c for n, c in found.columns.items() if not _interval(found) or n not in BOUNDS}
    own = [Column(plain(found.config.name), found.unit, _values(found))]
    if found.standard_errors:
        errors = tuple(number(e) for e in found.standard_errors)
        own.append(Column("standard error", "", errors))
    told = [Column(spoken(n), "", tuple(number(v) for v in c)) for n, c in others.items()]
    return [*own, *told]


BOUNDS = ("low", "high")
"""Columns that are the ends of the value's interval."""


def spoken(column: str) -> str:
    """The name of a metric's own column in words."""
    return column.replace("_", " ")


def _interval(found: Measurement) -> bool:
    return all(name in found.columns for name in BOUNDS)


def _values(found: Measurement) -> tuple[str, ...]:
    if not _interval(found):
        return tuple(number(v) for v in found.values)
    ends = zip(found.values, *(found.columns[name] for name in BOUNDS), strict=True)
    return tuple(f"{number(v)} [{number(low)}, {number(high)}]" for v, low, high in ends)


def heading(found: Measurement) -> str:
    """``v information of Smiling, round 10``."""
    config = found.config
    of = f" of {config.about}" if config.about else ""
    return f"{plain(config.name)}{of}, {rounds_in_words(config.rounds)}"


def rounds_in_words(rounds: Sequence[str]) -> str:
    """``round 10``, ``rounds 1, 2``; the attempt where it is not the first."""
    parts = [r.partition(":") for r in rounds]
    named = [r if attempt == "1" else f"{r} of attempt {attempt}" for attempt, _, r in parts]
    listed = ", ".join(named) if len(named) < 9 else f"{named[0]} to {named[-1]}"
    return f"{'round' if len(named) == 1 else 'rounds'} {listed}"


def about(found: Measurement) -> str:
    """On what it was measured: whose samples, how many, at what."""
    config = found.config
    said = WHOSE[config.source]
    if config.source != "none":
        said += f": {count(config.samples, 'sample')}"
    if config.source == "auxiliary":
        said += f", {config.data}"
    n = f"; n {found.n:,}" if found.n else ""
    updates = count(config.updates, "recorded update")
    relation = f"; {config.relation}" if config.relation else ""
    return f"{said}{relation}; at the global model behind {updates}{n}; seed {config.seed}"

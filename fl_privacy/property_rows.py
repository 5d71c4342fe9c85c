"""Scores of a property as result tables hold them: a cell holds one for each round of a target."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fl_privacy.results_format import HAS_PROPERTY, client_of, nodes_of

FEDERATION = "federation"
"""Whose the aggregates of a run are: they share clients, so that none is independent."""


class Scored(NamedTuple):
    """Score, truth and client of each batch, ``[n]`` each; None where the truth is not known."""

    scores: list[float]
    has: list[bool | None]
    clients: list[Hashable]


@dataclass(frozen=True)
class Counts:
    """How many batches are known to have a property and to lack it, and of how many clients.

    ``clients`` counts those with batches of either kind; ``aggregates``: they are of the federation
    as a whole.
    """

    having: int
    lacking: int
    unknown: int
    clients_having: int
    clients_lacking: int
    clients: int
    aggregates: bool

    @property
    def has_interval(self) -> bool:
        """Whether there are two independent ones of each kind, which an interval takes."""
        one = self.clients < 2
        having = self.having if one else self.clients_having
        lacking = self.lacking if one else self.clients_lacking
        return min(having, lacking) > 1

    def __str__(self) -> str:
        """``4 batches with the property, 32 without; rounds of 1 client``."""
        unknown = f", {self.unknown} unknown" if self.unknown else ""
        if self.clients < 2:
            whose = "federation" if self.aggregates else "client"
            said = f"{_batches(self.having)} with the property, {self.lacking} without{unknown}"
            only = ", and the interval says nothing of another" if self.has_interval else ""
            return f"{said}; rounds of 1 {whose}{only}"
        said = (
            f"{_batches(self.having)} with the property of {_clients(self.clients_having)}, "
            f"{self.lacking} without of {_clients(self.clients_lacking)}{unknown}"
        )
        if self.has_interval or not self.having or not self.lacking:
            return said
        return f"{said}: too few clients for an interval, attack one alone (--node) or sweep"


def _batches(n: int) -> str:
    return f"{n} batch" if n == 1 else f"{n} batches"


def _clients(n: int) -> str:
    return f"{n} client" if n == 1 else f"{n} clients"


def joined(values: Iterable[float | bool | None]) -> str:
    """``0.25,,1``: one entry an exchange, empty where there is none; truth is 1 or 0."""
    return ",".join(
        "" if value is None or math.isnan(value) else f"{float(value)!r}".removesuffix(".0")
        for value in values
    )


def parsed(cell: str) -> list[float]:
    """The entries of a cell; NaN where there is none."""
    return [float(entry) if entry else math.nan for entry in cell.split(",")]


def scored(rows: Iterable[Mapping[str, Any]], metric: str) -> Scored:
    """Score, truth and client of every exchange of ``rows`` that has a cell of the metric."""
    held = [row for row in rows if row.get(metric) is not None]
    aggregates = any(is_aggregate(row) for row in held)
    found = Scored([], [], [])
    for row in held:
        own = parsed(row[metric])
        found.scores.extend(own)
        found.has.extend(None if math.isnan(v) else bool(v) for v in parsed(row[HAS_PROPERTY]))
        found.clients.extend([FEDERATION if aggregates else client_of(row)] * len(own))
    return found


def is_aggregate(row: Mapping[str, Any]) -> bool:
    """Whether a target is of several clients."""
    return len(nodes_of(row.get("node") or "")) > 1


def counted(found: Scored) -> Counts:
    """How many batches of which kind there are, among those that have a score."""
    known = [
        (has, client)
        for score, has, client in zip(*found, strict=True)
        if math.isfinite(score) and has is not None
    ]
    having = [client for has, client in known if has]
    lacking = [client for has, client in known if not has]
    return Counts(
        having=len(having),
        lacking=len(lacking),
        unknown=len(found.has) - len(known),
        clients_having=len(set(having)),
        clients_lacking=len(set(lacking)),
        clients=len({*having, *lacking}),
        aggregates=FEDERATION in found.clients,
    )

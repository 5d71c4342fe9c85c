"""Scores of a property as result tables hold them: a cell holds one for each round of a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fl_privacy.results_format import HAS_PROPERTY


def joined(values: Iterable[float | bool | None]) -> str:
    """``0.25,,1``: one entry an exchange, empty where there is none; truth is 1 or 0."""
    return ",".join(
        "" if value is None or math.isnan(value) else f"{float(value)!r}".removesuffix(".0")
        for value in values
    )


def parsed(cell: str) -> list[float]:
    """The entries of a cell; NaN where there is none."""
    return [float(entry) if entry else math.nan for entry in cell.split(",")]


def scored(rows: Iterable[Mapping[str, Any]], metric: str) -> tuple[list[float], list[bool | None]]:
    """Score and truth of every exchange of ``rows`` that has a cell of the metric."""
    scores: list[float] = []
    has: list[bool | None] = []
    for row in rows:
        if row.get(metric) is None:
            continue
        scores += parsed(row[metric])
        has += [None if math.isnan(v) else bool(v) for v in parsed(row[HAS_PROPERTY])]
    return scores, has

"""A choice of layers to withhold in words and table cells, for the page and the terminal."""

from __future__ import annotations

from typing import Any

from fl_privacy.metrics.statistics import Interval
from fl_privacy.protection import Comparison, Measured, Protection, Spread
from fl_privacy.report.layer_words import WHOSE
from fl_privacy.report.words import count, interval, metric_name, number, plain
from fl_privacy.results import MetricInfo


def protection_table(found: Protection) -> dict[str, Any]:
    """One choice of layers to withhold, as text."""
    return {
        "title": f"Withhold {', '.join(found.layers)}",
        "by": plain(found.by),
        "ranked": ranked(found),
        "defense": found.defense,
        "sets": sets_in_words(found),
        "budget": count(found.budget, "random layer"),
        "lines": [
            {
                "who": plain(line.adversary),
                "metric": f"{metric_name(line.metric.name)}, {line.metric.unit}",
                **dict(zip(("nothing", "chosen", "random", "better"), cells(line), strict=True)),
            }
            for line in found.comparisons
        ],
    }


def ranked(found: Protection) -> list[str]:
    """What the layers were ranked by: sentences."""
    said = []
    if found.source != "none":
        said.append(f"{WHOSE[found.source]}.")
    if found.averaged:
        mean = "The mean of " if len(found.averaged) > 1 else ""
        said.append(f"{mean}{'; '.join(found.averaged)}.")
    if found.unranked:
        said.append(f"Without a number, hence in no choice: {', '.join(found.unranked)}.")
    return said


def sets_in_words(found: Protection) -> str:
    """``mean of 5 draws``, ``mean of all 3 other choices``."""
    sets = len(found.sets)
    if not found.every_set:
        return f"mean of {count(sets, 'draw')}"
    return "the only other choice" if sets == 1 else f"mean of all {sets} other choices"


def cells(line: Comparison) -> tuple[str, str, str, str]:
    """With nothing, the chosen and random layers withheld, and how much better chosen ones are."""
    failed = f" ({line.failed})" if line.failed else ""
    return (
        measured(line.nothing, line.metric),
        measured(line.chosen, line.metric) + failed,
        spread(line.random, line.metric),
        measured(line.better, line.metric, signed=True),
    )


def measured(value: Measured, metric: MetricInfo, *, signed: bool = False) -> str:
    """Mean and interval in the metric's usual precision."""
    return interval(Interval(value.mean, value.low, value.high, value.n), metric, signed=signed)


def spread(value: Spread, metric: MetricInfo) -> str:
    """``0.83 (0.70 to 0.91)``: mean, lowest and highest."""
    mean, lowest, highest = (number(v, metric) for v in (value.mean, value.lowest, value.highest))
    return f"{mean} ({lowest} to {highest})" if value.n > 1 else mean

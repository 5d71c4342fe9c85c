"""What an axis of a sweep changes: the aggregation study of [Mo2].

Mo et al.: Quantifying Information Leakage from Gradients, https://arxiv.org/abs/2105.13929: how
batch size, local epochs, number of clients, dropout and noise change what layers tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fl_privacy.metrics.statistics import Interval
from fl_privacy.property_table import WHOLE
from fl_privacy.report.words import plain
from fl_privacy.settings import Scalar
from fl_privacy.sweep.grid import Point
from fl_privacy.sweep.layer_drawings import AxisPanel, Line, layers_of, shown
from fl_privacy.sweep.layer_study import NOTHING, Number, Quantity, Studied
from fl_privacy.sweep.repeats import over_repeats

MOST_LAYERS = 8
"""With more of them a figure shows their mean and their largest instead."""

OVER: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean over layers": fmean,
    "largest layer": max,
}


@dataclass(frozen=True)
class Along:
    """Points that differ in one thing alone: values ascend, strengths stand as in the file."""

    axis: str
    ticks: tuple[str, ...]
    points: tuple[Studied, ...]
    fixed: str


def walks(found: Sequence[Studied]) -> list[Along]:
    """Every walk of two points or more along an axis of numbers, or the strengths of a defense."""
    points = [one.point for one in found]
    keys = [key for key, _ in points[0].axes] if points else []
    ways = [way for key in keys for way in _along_axis(found, key)]
    ways += [
        way for name in dict.fromkeys(p.defense for p in points) for way in _along(found, name)
    ]
    return [way for way in ways if len(way.points) > 1]


def _along_axis(found: Sequence[Studied], key: str) -> Iterator[Along]:
    def value(point: Point) -> Scalar:
        return dict(point.axes)[key]

    if not all(_is_number(value(one.point)) for one in found):
        return
    groups: dict[tuple[tuple[tuple[str, Scalar], ...], str, str], list[Studied]] = {}
    for one in found:
        others = tuple(pair for pair in one.point.axes if pair[0] != key)
        groups.setdefault((others, one.point.defense, one.point.strength), []).append(one)
    for (others, *_), unsorted in groups.items():
        own = sorted(unsorted, key=lambda one: float(value(one.point)))
        ticks = tuple(f"{value(one.point)}" for one in own)
        defended = own[0].point.label if own[0].point.spec else ""
        words = [*(f"{k} {v}" for k, v in others), *filter(None, [defended])]
        yield Along(key, ticks, tuple(own), ", ".join(words))


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _along(found: Sequence[Studied], defense: str) -> Iterator[Along]:
    """The strengths of one defense, from the undefended point on where there is one."""
    for group in dict.fromkeys(one.point.group for one in found):
        same = [one for one in found if one.point.group == group]
        own = [one for one in same if one.point.defense == defense and one.point.strength]
        free = [one for one in same if not one.point.spec][:1]
        if own:
            ticks = ("none",) * len(free) + tuple(one.point.strength for one in own)
            yield Along(f"strength of {defense}", ticks, (*free, *own), group)


def panels(way: Along, titles: Mapping[str, str]) -> list[AxisPanel]:
    """A panel an attacker or metric: each layer's mean over repeats at each point of the walk."""
    quantities = dict.fromkeys(q for one in way.points for q in shown(one.table))
    layers = [layer for layer in layers_of([one.table for one in way.points]) if layer != WHOLE]
    few = len(layers) <= MOST_LAYERS
    return [
        AxisPanel(
            title=plain(titles[quantity.title]),
            unit=quantity.unit,
            lines=_lines(way, quantity, layers) if few else _brief(way, quantity),
            null=[_null(one, quantity) for one in way.points],
        )
        for quantity in quantities
    ]


def _lines(way: Along, quantity: Quantity, layers: Sequence[str]) -> list[Line]:
    there = [one.table.get(quantity, {}) for one in way.points]
    labels = [*[WHOLE] * any(WHOLE in held for held in there), *layers]
    return [
        Line(label, [held[label].value if label in held else NOTHING for held in there])
        for label in labels
        if any(label in held for held in there)
    ]


def _brief(way: Along, quantity: Quantity) -> list[Line]:
    """The whole update, the mean over layers and the largest, each over repeats."""
    whole = [line for line in _lines(way, quantity, ()) if line.label == WHOLE]
    return whole + [
        Line(label, [_over(one, quantity, all_of) for one in way.points])
        for label, all_of in OVER.items()
    ]


def _over(one: Studied, quantity: Quantity, all_of: Callable[[Sequence[float]], float]) -> Interval:
    known = [_values(numbers, quantity) for numbers in one.repeats]
    each = (all_of(values) for values in known if values)
    return over_repeats(each, share=quantity.is_share)


def _values(numbers: Sequence[Number], quantity: Quantity) -> list[float]:
    own = [n for n in numbers if n.quantity == quantity and n.layer != WHOLE]
    return [n.value.mean for n in own if math.isfinite(n.value.mean)]


def _null(one: Studied, quantity: Quantity) -> float:
    """What chance gets: the mean over layers."""
    nulls = [number.null for number in one.table.get(quantity, {}).values()]
    known = [null for null in nulls if math.isfinite(null)]
    return fmean(known) if known else math.nan

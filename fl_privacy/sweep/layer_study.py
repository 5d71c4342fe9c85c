"""Layers over repeated runs: means with their intervals, peaks, and how well metrics predict.

The protocol of Figs. 1 to 3 of Mo et al., Layer-wise Characterization of Latent Information Leakage
in Federated Learning, https://arxiv.org/abs/2010.08762: a federation is run anew with each seed
(20 in the paper), and what is told of a layer is the mean over these runs with a 95 % interval.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fl_privacy.layer_results import Measurement
from fl_privacy.metrics.statistics import Interval, mean_interval
from fl_privacy.prediction import LayerAuc, Point, kind_of
from fl_privacy.property_table import WHOLE
from fl_privacy.report.layer_words import BOUNDS, rounds_in_words
from fl_privacy.report.layers import NULLS, intervals
from fl_privacy.sweep.grid import Point as GridPoint
from fl_privacy.sweep.layer_runs import LayerRun
from fl_privacy.sweep.repeats import over_repeats

NOTHING = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Quantity:
    """What is known of each layer: an attacker's AUC, a metric, or a ``column`` of one."""

    title: str
    unit: str
    column: str = ""
    attacked: bool = False

    @property
    def is_share(self) -> bool:
        """Whether its values lie in [0, 1]."""
        return self.attacked or self.unit.startswith("share")


@dataclass(frozen=True)
class Number:
    """A quantity at a layer, in one repeat or over all; ``null`` is what chance gets there.

    ``repeats`` counts those behind the value. The interval is over them; of a single one it is
    its own, over batches or samples.
    """

    quantity: Quantity
    layer: str
    value: Interval
    null: float
    repeats: int = 1


Table = Mapping[Quantity, Mapping[str, Number]]
"""Of each quantity the number at each layer."""


def numbers_of(run: LayerRun) -> list[Number]:
    """Everything that one repeat told, attacks first."""
    return [*_attacked(run.aucs), *_measured(run.measured)]


def _attacked(aucs: Sequence[LayerAuc]) -> Iterator[Number]:
    several = _several(auc.property for auc in aucs)
    for auc in aucs:
        title = f"{auc.attacker}, {auc.property}" if several else auc.attacker
        quantity = Quantity(title, "AUC (0.5: chance)", attacked=True)
        yield Number(quantity, auc.layer, auc.auc, auc.null.mean if auc.null else math.nan)


def _measured(found: Sequence[Measurement]) -> Iterator[Number]:
    by_property = _several(one.config.about for one in found if one.config.about)
    by_rounds = _several(one.config.rounds for one in found)
    for one in found:
        title = kind_of(one)
        title += f", {one.config.about}" if by_property and one.config.about else ""
        title += f", {rounds_in_words(one.config.rounds)}" if by_rounds else ""
        yield from measurement_numbers(one, title)


def measurement_numbers(found: Measurement, title: str) -> Iterator[Number]:
    """The values of a measurement, then its columns."""
    nulls = next((found.columns[name] for name in NULLS if name in found.columns), None)
    rows = zip(found.layers, found.values, *intervals(found), strict=True)
    for i, (layer, value, low, high) in enumerate(rows):
        null = nulls[i] if nulls else math.nan
        yield Number(Quantity(title, found.unit), layer, Interval(value, low, high, found.n), null)
    for column, values in found.columns.items():
        if column in BOUNDS:
            continue
        for layer, value in zip(found.layers, values, strict=True):
            alone = Interval(value, math.nan, math.nan, found.n)
            yield Number(Quantity(title, "", column), layer, alone, math.nan)


def _several(values: Iterable[object]) -> bool:
    return len(set(values)) > 1


def summary(repeats: Sequence[Sequence[Number]]) -> Table:
    """Of each quantity at each layer the mean over repeats, with its 95 % Student t interval.

    That of an AUC or a share is cut at 0 and 1. What a single repeat told keeps its own interval;
    numbers that are not finite are left out. Layers stand in the order of the forward pass.
    """
    found: dict[Quantity, dict[str, list[Number]]] = {}
    for number in (n for numbers in repeats for n in numbers):
        found.setdefault(number.quantity, {}).setdefault(number.layer, []).append(number)
    return {
        quantity: {layer: _mean(same) for layer, same in layers.items()}
        for quantity, layers in found.items()
    }


def _mean(same: Sequence[Number]) -> Number:
    known = [n for n in same if math.isfinite(n.value.mean)]
    if len(known) < 2:
        return known[0] if known else replace(same[0], value=NOTHING, repeats=0)
    value = over_repeats((n.value.mean for n in known), share=known[0].quantity.is_share)
    null = mean_interval(n.null for n in known).mean
    return replace(known[0], value=value, null=null, repeats=len(known))


@dataclass(frozen=True)
class Studied:
    """A point of the sweep, and what its repeats told of layers."""

    point: GridPoint
    model: str
    runs: tuple[LayerRun, ...]

    @cached_property
    def repeats(self) -> list[list[Number]]:
        """The numbers of each repeat."""
        return [numbers_of(run) for run in self.runs]

    @cached_property
    def table(self) -> Table:
        """Their means."""
        return summary(self.repeats)


@dataclass(frozen=True)
class Peak:
    """The layers with the largest mean, and in how many of the repeats one of them is the peak.

    ``value`` is the mean at the first of them and ``null`` that of its nulls, over repeats.
    """

    quantity: Quantity
    layers: tuple[str, ...]
    times: int
    repeats: int
    value: Interval
    null: Interval


def peaks(repeats: Sequence[Sequence[Number]]) -> list[Peak]:
    """The peak of every attacker and metric; layers that are equal share it."""
    found = []
    for quantity, layers in summary(repeats).items():
        own = [n for numbers in repeats for n in [_at(numbers, quantity)] if n]
        top = _largest({layer: number.value.mean for layer, number in layers.items()})
        if quantity.column or not top:
            continue
        times = sum(bool(set(top) & set(_largest(values))) for values in own)
        there = [n for numbers in repeats for n in numbers]
        there = [n for n in there if (n.quantity, n.layer) == (quantity, top[0])]
        nulls = _mean([replace(n, value=replace(NOTHING, mean=n.null)) for n in there]).value
        found.append(Peak(quantity, top, times, len(own), layers[top[0]].value, nulls))
    return found


def _at(numbers: Sequence[Number], quantity: Quantity) -> dict[str, float]:
    return {n.layer: n.value.mean for n in numbers if n.quantity == quantity}


def _largest(values: Mapping[str, float]) -> tuple[str, ...]:
    known = {k: v for k, v in values.items() if math.isfinite(v) and k != WHOLE}
    return tuple(k for k, v in known.items() if v == max(known.values()))


def normalized(found: Sequence[Point]) -> list[Point]:
    """Points whose values are spread over 0 to 1 in each group, as in Fig. 3.

    A group is what one repeat told about one property; what does not vary in it is left out.
    """
    groups: dict[object, list[Point]] = {}
    for point in found:
        if math.isfinite(point.value):
            groups.setdefault((point.metric, point.column, point.group), []).append(point)
    ends = {
        key: (min(p.value for p in own), max(p.value for p in own)) for key, own in groups.items()
    }
    return [
        replace(p, value=(p.value - ends[key][0]) / (ends[key][1] - ends[key][0]))
        for key, own in groups.items()
        if ends[key][0] < ends[key][1]
        for p in own
    ]


def short_titles(titles: Iterable[str]) -> dict[str, str]:
    """Titles without settings, where they tell quantities apart without them."""
    whole = list(dict.fromkeys(titles))
    bare = {title: re.sub(r" \(.*\)", "", title) for title in whole}
    counts = Counter(bare.values())
    return {title: short if counts[short] == 1 else title for title, short in bare.items()}

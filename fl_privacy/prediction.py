"""Do metrics predict what an attacker achieves? Their correlation with its AUC over layers.

As Figs. 1 to 3 of Mo et al., https://arxiv.org/abs/2010.08762: over the layers of a network, as a
mean over properties and attackers and, where points of several runs are brought together, over
repeats and models.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fl_privacy.component import parse
from fl_privacy.layer_results import Measurement
from fl_privacy.metrics.correlation import Correlation, Profile, correlate
from fl_privacy.metrics.statistics import Interval
from fl_privacy.property_facts import PropertyFacts
from fl_privacy.property_rows import Counts


@dataclass(frozen=True)
class LayerAuc:
    """What one attacker got from one layer alone; ``property`` empty where it is not named.

    ``null``: the same attacker, taught a property that means nothing. ``counts``: the batches, and
    of how many clients they are; ``relation``: what the auxiliary data tells of the property.
    """

    attacker: str
    property: str
    layer: str
    auc: Interval
    null: Interval | None = None
    counts: Counts | None = None
    relation: PropertyFacts | None = None


@dataclass(frozen=True)
class Point:
    """One number of a metric at one layer beside the AUC there.

    ``column`` is empty for the metric's own value. Points of one ``group`` (run, property,
    attacker and global model) differ in the layer alone. ``network`` names the layers that were
    measured: networks that have the same ones count as one.
    """

    metric: str
    column: str
    layer: str
    group: Hashable
    value: float
    auc: float
    run: str = ""
    network: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """How well a metric, or one of its columns, predicts the AUC."""

    metric: str
    column: str
    pearson: Correlation
    spearman: Correlation


def points(measured: Iterable[Measurement], aucs: Sequence[LayerAuc], run: str = "") -> list[Point]:
    """Every number of every metric beside the AUC at its layer.

    A metric about a property meets the AUC of that property alone, another one that of each.
    """
    return [
        Point(
            metric=kind_of(found),
            column=column,
            layer=layer,
            group=(run, attack.property, attack.attacker, found.config.rounds),
            value=value,
            auc=attack.auc.mean,
            run=run,
            network=found.layers,
        )
        for found in measured
        for attack in aucs
        if same_property(found.config.about, attack.property)
        for column, numbers in {"": found.values, **found.columns}.items()
        for layer, value in zip(found.layers, numbers, strict=True)
        if layer == attack.layer
    ]


def same_property(measured: str, attacked: str) -> bool:
    """Whether both are about one property, as far as they name one."""
    return measured == attacked or not measured or not attacked


def kind_of(found: Measurement) -> str:
    """The metric with its settings but the property, so that those of several are one kind."""
    config = found.config
    name, settings = parse(config.metric)
    rest = {k: v for k, v in settings.items() if k != "property"}
    on = "" if config.source == "none" else f", {config.source}"
    return f"{name}{f' ({words(rest)})' if rest else ''}{on}"


def words(settings: Mapping[str, object]) -> str:
    """``batches 40, folds 3``."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def predictions(found: Sequence[Point], *, seed: int = 0) -> list[Prediction]:
    """Correlations of each metric and column, where three layers or more have an AUC."""
    told = []
    for metric, column in dict.fromkeys((p.metric, p.column) for p in found):
        own = profiles([p for p in found if (p.metric, p.column) == (metric, column)])
        pearson = correlate(own, kind="pearson", seed=seed)
        spearman = correlate(own, kind="spearman", seed=seed)
        if math.isfinite(pearson.interval.mean):
            told.append(Prediction(metric, column, pearson, spearman))
    return told


def profiles(found: Iterable[Point]) -> list[Profile]:
    """What each group of the points of one metric and column says of its layers."""
    groups: dict[Hashable, list[Point]] = {}
    for point in found:
        groups.setdefault((point.network, point.group), []).append(point)
    return [
        Profile(
            network=own[0].network,
            run=own[0].run,
            x={p.layer: p.value for p in own},
            y={p.layer: p.auc for p in own},
        )
        for own in groups.values()
    ]

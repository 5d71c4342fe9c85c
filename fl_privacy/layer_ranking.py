"""Layers by how much they tell, and which of them to withhold: the leakiest, and random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from fl_privacy.layer_results import Measurement, Source, by_layer
from fl_privacy.prediction import LayerAuc
from fl_privacy.protection import ProtectionError
from fl_privacy.report.layer_words import heading
from fl_privacy.seeding import generator

AUC = "auc"
"""Ranks layers by what an attacker got from each."""

SAMPLES: dict[Source, str] = {
    "none": "no samples", "auxiliary": "auxiliary data", "audit": "the clients' own samples"
}  # fmt: skip
"""Whose samples a metric was measured on, in words."""


@dataclass(frozen=True)
class Ranking:
    """Layers by a number, the leakiest first; ``by`` says which number that is.

    It is the mean of what was ``averaged``, on samples of ``source``. ``unranked`` are layers that
    the run knows and that have no such number.
    """

    by: str
    unit: str
    order: tuple[tuple[str, float], ...]
    averaged: tuple[str, ...] = ()
    source: Source = "none"
    unranked: tuple[str, ...] = ()


def ranking_of(by: str, measured: Sequence[Measurement], aucs: Sequence[LayerAuc]) -> Ranking:
    """Layers by the metric ``by``, or by ``auc``; empty: that, if there.

    A metric goes by its name, its whole spec, or the name of one measurement's file. Of
    several measurements or attacks the mean over them is taken, a layer that one lacks by
    those that have it; of measurements that were repeated by other code the `newest`.

    Raises:
        ProtectionError: nothing ranks the layers so (lists what there is), or several measurements
            do of which there is no mean.
    """
    names = sorted({m.config.metric for m in measured} | ({AUC} if aucs else set()))
    if not by and not aucs and len({m.config.name for m in measured}) == 1:
        by = measured[0].config.name
    by = by or (AUC if aucs else "")
    own = newest([m for m in measured if by in (m.config.name, m.config.metric, stem(m))])
    source: Source = "none"
    if by == AUC and aucs:
        tables = [{a.layer: a.auc.mean} for a in aucs]
        unit, averaged = "AUC", [f"{a.attacker}, {a.property}".rstrip(", ") for a in aucs]
    elif own:
        refuse_mixture(by, own)
        tables, averaged = [dict(by_layer(m)) for m in own], [in_words(m) for m in own]
        unit, source = own[0].unit, own[0].config.source
    else:
        there = "; ".join(names) or "nothing yet: fl-privacy measure, or attack with layers=each"
        said = f"nothing ranks layers by {by!r}" if by else "nothing says how to rank layers"
        raise ProtectionError(f"{said}: choose --by of what the run holds ({there})")
    held = {layer: [t[layer] for t in tables if layer in t] for t in tables for layer in t}
    order = sorted(((n, fmean(v)) for n, v in held.items()), key=lambda one: -one[1])
    known = dict.fromkeys([n for m in measured for n in m.layers] + [a.layer for a in aucs])
    unranked = tuple(layer for layer in known if layer not in held)
    return Ranking(by, unit, tuple(order), tuple(dict.fromkeys(averaged)), source, unranked)


def newest(found: Sequence[Measurement]) -> list[Measurement]:
    """Each measurement once: of those that differ in what computed them alone, the last made."""
    machine = {"code_digest": "", "versions": {}, "device": "", "threads": 0}
    made = sorted(found, key=lambda m: m.created)
    return list({m.config.model_copy(update=machine).digest: m for m in made}.values())


def refuse_mixture(by: str, own: Sequence[Measurement]) -> None:
    """Check that there is a mean of these measurements.

    Raises:
        ProtectionError: they are on samples of different people's, or in different units.
    """
    if len({(m.config.source, m.unit) for m in own}) > 1:
        each = "; ".join(f"{stem(m)}, in {m.unit}, on {SAMPLES[m.config.source]}" for m in own)
        raise ProtectionError(
            f"measurements by {by!r} cannot be averaged ({each}): choose one with --by, such as "
            f"--by {stem(own[0])}"
        )


def stem(found: Measurement) -> str:
    """The name of a measurement's file, without its ending."""
    return Path(found.config.file_name).stem


def in_words(found: Measurement) -> str:
    """``v_information-1a2b3c4d: v information of Smiling, round 10, seed 0``."""
    return f"{stem(found)}: {heading(found)}, seed {found.config.seed}"


def chosen(ranking: Ranking, budget: int) -> tuple[str, ...]:
    """The ``budget`` leakiest layers.

    Raises:
        ProtectionError: there are not more layers than that.
    """
    if not 1 <= budget < len(ranking.order):
        raise ProtectionError(
            f"expected a budget of 1 to {len(ranking.order) - 1} layers, as {ranking.by} ranks "
            f"{len(ranking.order)}, got {budget}"
        )
    return tuple(layer for layer, _ in ranking.order[:budget])


def random_sets(
    layers: Sequence[str], budget: int, repeats: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """``repeats`` draws of ``budget`` of the ``layers``, in their order, other than the first.

    No two are the same; all others there are where these are no more than ``repeats``.
    """
    first = tuple(range(budget))
    sets: dict[tuple[int, ...], None] = {}
    draw = generator(seed, "layers to withhold", budget)
    while len(sets) < min(repeats, math.comb(len(layers), budget) - 1):
        picked = torch.randperm(len(layers), generator=draw)[:budget].sort().values.tolist()
        if tuple(picked) != first:
            sets[tuple(picked)] = None
    return tuple(tuple(layers[i] for i in one) for one in sets)

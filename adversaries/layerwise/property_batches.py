"""Batches with and without a property, drawn from people who are kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from fl_privacy.datasets.properties import HAS, LACKS, PropertyError, telling_property
from fl_privacy.layers import LayerMetricError
from fl_privacy.seeding import derive_seed, generator
from fl_privacy.types import PositiveInt, Samples

PropertyName = Annotated[
    str, Field(description="property of the samples; empty: the only one they have")
]
BatchSize = Annotated[
    PositiveInt | None, Field(description="samples in a batch; none: as the clients'")
]

WORDS = {HAS: "with", LACKS: "without"}
"""A value of a property in words."""


@dataclass(frozen=True)
class Batches:
    """``indices [n, size]`` of samples; ``has [n]`` 0 or 1; ``folds [n]`` of whose people."""

    indices: Tensor
    has: Tensor
    folds: Tensor

    def __len__(self) -> int:
        return len(self.has)


def values_of(samples: Samples, name: str) -> Tensor:
    """The values of a property, ``[n]``: 1 has it, 0 has not, -1 unknown.

    Raises:
        LayerMetricError: no such property, or one that all or none have.
    """
    try:
        return telling_property(samples.properties, name, "the samples").values
    except PropertyError as error:
        raise LayerMetricError(str(error)) from None


def draw_batches(values: Tensor, fold_of: Tensor, batches: int, size: int, seed: int) -> Batches:
    """In each fold ``batches`` batches all of whose samples have the property, and as many none of.

    ``values [n]`` of the property, ``fold_of [n]`` of `folds_of`. A batch belongs to the people of
    one fold. Within a fold batches share no sample until all have been used, and only then are
    they shuffled anew.

    Raises:
        LayerMetricError: a fold with too few samples for a batch.
    """
    folds = int(fold_of.max()) + 1
    indices, has, of = [], [], []
    for fold in range(folds):
        for value in (1, 0):
            pool = torch.nonzero((fold_of == fold) & (values == value)).flatten()
            if len(pool) < size:
                raise LayerMetricError(
                    f"fold {fold + 1} of {folds} holds {len(pool)} samples {WORDS[value]} the "
                    f"property, and a batch needs {size}: expected {folds * size} or more in all "
                    f"folds, got {int((values == value).sum())}; give more samples, or lower "
                    f"batch_size or folds"
                )
            draw = generator(seed, "property batches", fold, value)
            indices.append(in_turn(pool, size, batches, draw))
            has.append(torch.full((batches,), value))
            of.append(torch.full((batches,), fold))
    return Batches(torch.cat(indices), torch.cat(has), torch.cat(of))


def shuffled(values: Tensor, fold_of: Tensor, seed: int) -> Tensor:
    """The property dealt out anew among the samples of each fold: the same shares, no meaning."""
    dealt, draw = values.clone(), generator(seed, "shuffled property")
    for fold in range(int(fold_of.max()) + 1):
        inside = torch.nonzero(fold_of == fold).flatten()
        dealt[inside] = values[inside[torch.randperm(len(inside), generator=draw)]]
    return dealt


def draw_apart(
    samples: Samples, property: str, *, batches: int, size: int, seed: int
) -> list[Tensor]:
    """``batches`` batches that have the property, then as many that have not, ``[size]`` each.

    No two share a sample.

    Raises:
        LayerMetricError: no usable property, or too few samples.
    """
    values = values_of(samples, property)
    drawn: list[Tensor] = []
    for value in (1, 0):
        pool = torch.nonzero(values == value).flatten()
        if len(pool) < batches * size:
            raise LayerMetricError(
                f"expected {batches * size} samples {WORDS[value]} the property, for {batches} "
                f"batches of {size} that share none, got {len(pool)}: give more samples, or lower "
                f"batch_size or n"
            )
        draw = generator(seed, "property batches", value)
        drawn += in_turn(pool, size, batches, draw)
    return drawn


def folds_of(values: Tensor, people: Tensor | None, folds: int, seed: int) -> Tensor:
    """The fold of each sample, ``[n]``, with about the same share of the property in each.

    -1 for samples of which the property is unknown. All samples of one of the ``people [n]`` are
    in the same fold; where people are unknown, each sample is taken to be of another.

    Raises:
        LayerMetricError: fewer samples of one kind than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    known = torch.nonzero(values >= 0).flatten()
    fold_of = torch.full_like(values, -1)
    draw = derive_seed(seed, "folds of people") % 2**32
    fewest = min(int((values == value).sum()) for value in (0, 1))
    if fewest < folds:
        raise LayerMetricError(
            f"expected {folds} or more samples with and without the property, one for each fold, "
            f"got {fewest}: give more samples, or lower folds"
        )
    if people is None:
        split = StratifiedKFold(folds, shuffle=True, random_state=draw).split(known, values[known])
    else:
        kind = StratifiedGroupKFold(folds, shuffle=True, random_state=draw)
        split = kind.split(known, values[known], people[known])
    for fold, (_, inside) in enumerate(split):
        fold_of[known[np.asarray(inside)]] = fold
    return fold_of


def in_turn(pool: Tensor, size: int, count: int, draw: Generator) -> Tensor:
    """``count`` batches from ``pool``, disjoint until it is used up: ``[count, size]``."""
    each = len(pool) // size
    rounds = [
        pool[torch.randperm(len(pool), generator=draw)[: each * size]].view(each, size)
        for _ in range(-(-count // each))
    ]
    return torch.cat(rounds)[:count]


def models_of(batches: Batches, models: int) -> Tensor:
    """At which of ``models`` global models each batch is taken, ``[n]``.

    A fold has models of its own where there are enough for every fold, so that rounds are kept
    apart as people are; otherwise each fold goes through all of them. Batches with and without
    the property are taken at the same ones.
    """
    folds, chosen = int(batches.folds.max()) + 1, torch.empty_like(batches.folds)
    for fold in range(folds):
        own = torch.arange(models)
        own = own[own % folds == fold] if models >= folds else own
        for value in (0, 1):
            here = torch.nonzero((batches.folds == fold) & (batches.has == value)).flatten()
            chosen[here] = own[torch.arange(len(here)) * len(own) // len(here)]
    return chosen

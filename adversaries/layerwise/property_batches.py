"""Batches with and without a property, drawn from people who are kept apart."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from adversaries.dealt_property import dealt_anew
from fl_privacy.datasets.properties import HAS, LACKS, PropertyError, secret_property
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

TRIES = 100
"""How often a property is dealt out anew that leaves too few samples of a kind."""


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
        LayerMetricError: no such property, one that all or none have, or that the labels give away.
    """
    try:
        return secret_property(samples, name, "the samples").values
    except PropertyError as error:
        raise LayerMetricError(str(error)) from None


@dataclass(frozen=True)
class Draws:
    """How batches are drawn: in each of ``folds`` groups of people ``batches`` with a property.

    And as many without, ``size`` samples each. ``values [n]`` of the property, ``people [n]`` as in
    `Samples`. ``apart``: no two batches share a sample.
    """

    values: Tensor
    people: Tensor | None
    folds: int
    batches: int
    size: int
    apart: bool = False

    def told(self, seed: int) -> Batches:
        """Batches by the property as it is.

        Raises:
            LayerMetricError: too few samples or people.
        """
        return self._by(self.values, seed)

    def untold(self, seed: int) -> Batches:
        """Batches by a property that means nothing: `dealt_anew`, and people grouped anew.

        If people look as they do whatever they have, these differ from `told` by nothing but
        chance, so that a number of `told` is above those of 19 such with a probability of 5 %.
        Deals that leave too few samples for the batches are not taken.

        Raises:
            LayerMetricError: too few samples or people.
        """
        for number in range(TRIES):
            own = derive_seed(seed, "dealt anew", number)
            with suppress(LayerMetricError):
                return self._by(dealt_anew(self.values, self.people, own), own)
        raise LayerMetricError(
            f"none of {TRIES} ways to deal the property out among people leaves samples with and "
            f"without it for every batch: give samples of more people, or lower batch_size or "
            f"{self._many}"
        )

    def _by(self, values: Tensor, seed: int) -> Batches:
        fold_of = folds_of(values, self.people, self.folds, seed)
        indices, has, folds = [], [], []
        for fold in range(self.folds):
            for value in (HAS, LACKS):
                pool = torch.nonzero((fold_of == fold) & (values == value)).flatten()
                self._check(len(pool), fold, value, int((values == value).sum()))
                draw = generator(seed, "property batches", fold, value)
                indices.append(in_turn(pool, self.size, self.batches, draw))
                has.append(torch.full((self.batches,), value))
                folds.append(torch.full((self.batches,), fold))
        return Batches(torch.cat(indices), torch.cat(has), torch.cat(folds))

    def _check(self, held: int, fold: int, value: int, every: int) -> None:
        """Refuse a fold that ``held`` too few samples, ``every`` of that value in all."""
        needed = self.size * (self.batches if self.apart else 1)
        if held >= needed:
            return
        what = f"{self.batches} batches that share none need" if self.apart else "a batch needs"
        why = (
            f"expected {self.folds * needed} or more in all folds, got {every}; give more samples"
            if every < self.folds * needed
            else f"there are {every} in all, but of people who cannot be shared out evenly; give "
            f"samples of more people"
        )
        raise LayerMetricError(
            f"fold {fold + 1} of {self.folds} holds {held} samples {WORDS[value]} the property, "
            f"and {what} {needed}: {why}, or lower batch_size or {self._many}"
        )

    @property
    def _many(self) -> str:
        """The setting that a user lowers to need fewer samples."""
        return "n" if self.apart else "folds"


def distinct(batches: Batches, people: Tensor | None) -> dict[str, int]:
    """How many distinct samples of each kind the batches hold, and of how many people, if known."""
    told = {}
    for value, word in WORDS.items():
        seen = torch.unique(batches.indices[batches.has == value])
        told[f"samples {word} it"] = len(seen)
        if people is not None:
            told[f"people {word} it"] = len(torch.unique(people[seen]))
    return told


def folds_of(values: Tensor, people: Tensor | None, folds: int, seed: int) -> Tensor:
    """The fold of each sample, ``[n]``, with about the same share of the property in each.

    -1 for samples of which the property is unknown. All samples of one of the ``people [n]`` are
    in the same fold; where people are unknown, each sample is taken to be of another.

    Raises:
        LayerMetricError: fewer samples of one kind, or fewer people, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    known = torch.nonzero(values >= 0).flatten()
    fold_of = torch.full_like(values, -1)
    draw = derive_seed(seed, "folds of people") % 2**32
    fewer = ", or lower folds" if folds > 3 else ""
    fewest = min(int((values == value).sum()) for value in (HAS, LACKS))
    if fewest < folds:
        raise LayerMetricError(
            f"expected {folds} or more samples with and without the property, one for each fold, "
            f"got {fewest}: give more samples{fewer}"
        )
    if people is None:
        split = StratifiedKFold(folds, shuffle=True, random_state=draw).split(known, values[known])
    else:
        if (there := len(torch.unique(people[known]))) < folds:
            raise LayerMetricError(
                f"expected {folds} or more people of whom the property is known, one for each "
                f"fold, got {there}: give samples of more people{fewer}"
            )
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

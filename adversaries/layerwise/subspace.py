"""How far a property turns the subspace that a layer's gradients span: [Mo2].

Mo et al.: Quantifying Information Leakage from Gradients, https://arxiv.org/abs/2105.13929.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from adversaries.layerwise.batch_gradients import (
    batch_size_of,
    chosen_layers,
    global_models,
    gradients_of,
)
from adversaries.layerwise.families import Floats
from adversaries.layerwise.property_batches import (
    BatchSize,
    Draws,
    PropertyName,
    distinct,
    values_of,
)
from adversaries.layerwise.sensitivity_table import Layers, checked
from adversaries.layerwise.subspaces import Distance, distance, small_factor
from fl_privacy.component import Component
from fl_privacy.layers import LayerMetricError, weight_of
from fl_privacy.protocols import Progress, silent
from fl_privacy.seeding import derive_seed
from fl_privacy.types import Exchange, LayerScores, Observation, PositiveInt, Samples

HALVES = 2
"""Groups of people that are compared."""


class SubspaceDistance(Component):
    """Distance between the subspaces of gradients with and without a property (r).

    The paper gives no formula; ours is a reconstruction. At a recorded global model, columns are
    a layer's weight gradients of ``n`` batches all of whose samples have the property, and of
    ``n`` batches without it, of other people; of each matrix the ``k`` leading left singular
    vectors span a subspace, uncentered; the geodesic distance between the two goes from 0 (the
    same) to 1 (orthogonal), `subspaces.distance`. The people are in two halves, and the value is
    the mean over which half has the property. All layers have the same ``n`` and ``k``, without
    which they could not be compared.

    Random subspaces of many dimensions are close to orthogonal, and so are any two samples of
    noisy gradients, or two groups of people. So stand beside it: the distance ``within`` the
    kinds, between the halves where both have the property or both have it not, and the ``null``:
    all of it again with the property dealt out anew among people (`dealt_anew`; mean, and largest
    of ``permutations``: with 19 of them a value above is significant at 5 %). Where people are
    not known each sample is taken to be of another, halves share people, and a value above the
    null may be that of people, not of the property.

    No two batches share a sample; how many samples of each kind they hold, and of how many people,
    comes last. NaN where the gradients of a layer have a rank below ``k``. Several global models
    are averaged, with a standard error over them: rounds of one run, not repeats of it.
    """

    needs: ClassVar[Literal["updates", "property", "data"]] = "property"

    property: PropertyName = ""
    n: Annotated[int, Field(ge=2, description="gradients in each matrix")] = 8
    k: Annotated[PositiveInt, Field(description="dimension of the subspaces")] = 4
    batch_size: BatchSize = None
    permutations: Annotated[
        PositiveInt, Field(description="deals of the property, for the null")
    ] = 19
    layers: Layers = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.n:
            raise ValueError(f"k must be n = {self.n} or less, the rank of a matrix, got {self.k}")
        return self

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores:
        """Geodesic distances, as a share of the largest.

        Raises:
            LayerMetricError: no observation, samples that do not fit the task, no usable property,
                too few samples or people, an unknown layer, or one with fewer than ``k`` weights.
        """
        data, models = checked(samples, observations), global_models(observations)
        layers = chosen_layers(observations[0], self.layers)
        self._check_ranks(models[0], layers)
        size = batch_size_of(observations[0], self.batch_size)
        draws = Draws(values_of(data, self.property), data.people, HALVES, self.n, size, apart=True)
        held = draws.told(seed)
        nulls = [derive_seed(seed, "property dealt anew", i) for i in range(self.permutations)]
        drawn = [held, *(draws.untold(own) for own in nulls)]
        batches = [indices for one in drawn for indices in one.indices] * len(models)
        at = [place for place in range(len(models)) for _ in range(len(drawn) * len(held))]
        made = gradients_of(observations, layers, data, batches, at, device=device, seed=seed)
        found = []
        for number in range(len(models) * len(drawn)):
            columns: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            for done, (_, gradient) in enumerate(islice(made, len(held)), number * len(held) + 1):
                for layer in layers:
                    columns[layer].append(gradient[layer].cpu())
                progress(done, len(batches))
            factors = [small_factor(columns.pop(layer)) for layer in layers]
            found.append([compared(factor, self.k) for factor in factors])
        shape = len(models), len(drawn), len(layers), -1, 2
        each = torch.tensor(found, dtype=torch.float64).reshape(shape)
        return layer_scores(layers, each, len(held), distinct(held, data.people))

    def _check_ranks(self, sent: Exchange, layers: Sequence[str]) -> None:
        for layer in layers:
            weights = sent.parameters[weight_of(layer)].numel()
            if weights < self.k:
                raise LayerMetricError(
                    f"layer {layer} has {weights} weights, in which no {self.k} directions fit: "
                    f"lower k, or choose other layers"
                )


def compared(columns: Floats, k: int) -> list[Distance]:
    """Distances between halves of people: of the kinds, either way round, then within each kind.

    ``columns [m, 4 n]`` as `Draws` gives batches: of one half ``n`` with the property and ``n``
    without, then of the other.
    """
    one_with, one_without, other_with, other_without = np.split(columns, 2 * HALVES, axis=1)
    pairs = (
        (one_with, other_without), (one_without, other_with),
        (one_with, other_with), (one_without, other_without),
    )  # fmt: skip
    return [distance(first, second, k) for first, second in pairs]


def layer_scores(
    layers: tuple[str, ...], found: Tensor, n: int, held: Mapping[str, int]
) -> LayerScores:
    """``found [models, draws, layers, 4, 2]`` of `compared`; ``n`` batches, which ``held`` so many.

    The first draw is about the property, the others about one that means nothing.
    """
    kinds, within = found[..., :2, :].mean(3), found[..., 2:, :].mean(3)
    geodesic, chordal = kinds.mean(0).unbind(-1)
    beside = within[:, 0].mean(0)
    null = geodesic[1:]
    columns = {
        "chordal": chordal[0],
        "within, geodesic": beside[:, 0],
        "within, chordal": beside[:, 1],
        "null": null.mean(0),
        f"null, largest of {len(null)}": null.amax(0),
    }
    if len(found) > 1:
        columns["standard error over models"] = kinds[:, 0, :, 0].std(0) / math.sqrt(len(found))
    columns |= {name: torch.full_like(geodesic[0], count) for name, count in held.items()}
    unit = "share of the largest distance"
    return LayerScores("subspace_distance", unit, layers, geodesic[0], n=n, columns=columns)

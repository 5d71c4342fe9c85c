"""How far a property turns the subspace that a layer's gradients span: [Mo2].

Mo et al.: Quantifying Information Leakage from Gradients, https://arxiv.org/abs/2105.13929.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adversaries.layerwise.batch_gradients import (
    batch_size_of,
    chosen_layers,
    global_models,
    gradients_of,
)
from adversaries.layerwise.property_batches import BatchSize, PropertyName, draw_apart
from adversaries.layerwise.sensitivity_table import Layers, checked
from adversaries.layerwise.subspaces import distance, small_factor
from fl_privacy.component import Component
from fl_privacy.layers import LayerMetricError, weight_of
from fl_privacy.protocols import Progress, silent
from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, LayerScores, Observation, PositiveInt, Samples


class SubspaceDistance(Component):
    """Distance between the subspaces of gradients with and without a property (r).

    The paper gives no formula; ours is a reconstruction. At a recorded global model, columns are
    a layer's weight gradients of ``n`` batches all of whose samples have the property, and of
    ``n`` batches without it; of each matrix the ``k`` leading left singular vectors span a
    subspace, uncentered; the value is the geodesic distance between the two, from 0 (the same)
    to 1 (orthogonal), `subspaces.distance`. All layers have the same ``n`` and ``k``, without
    which they could not be compared.

    Random subspaces of many dimensions are close to orthogonal, and so are any two samples of
    noisy gradients. So stand beside it: the distance ``within`` the kinds, between ``n`` and
    another ``n`` batches that both have the property or both have it not, and the ``null``, between
    ``n`` and ``n`` of the compared batches dealt out with no eye to the property (mean, and largest
    of ``permutations``: with 19 of them a value above is significant at 5 %). No two batches share
    a sample. NaN where the gradients of a layer have a rank below ``k``. Several global models are
    averaged, with a standard error over them: rounds of one run, not repeats of it.
    """

    needs: ClassVar[Literal["updates", "property", "data"]] = "property"

    property: PropertyName = ""
    n: Annotated[int, Field(ge=2, description="gradients in each matrix")] = 8
    k: Annotated[PositiveInt, Field(description="dimension of the subspaces")] = 4
    batch_size: BatchSize = None
    permutations: Annotated[PositiveInt, Field(description="of labels, for the null")] = 19
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
                too few samples, an unknown layer, or one with fewer than ``k`` weights.
        """
        data, models = checked(samples, observations), global_models(observations)
        layers = chosen_layers(observations[0], self.layers)
        self._check_ranks(models[0], layers)
        size = batch_size_of(observations[0], self.batch_size)
        batches = draw_apart(data, self.property, batches=2 * self.n, size=size, seed=seed)
        splits = comparisons(self.n, self.permutations, seed)
        total, found = len(models) * len(batches), []
        for place in range(len(models)):
            columns: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            at = [place] * len(batches)
            made = gradients_of(observations, layers, data, batches, at, device=device, seed=seed)
            for done, (_, gradient) in enumerate(made, place * len(batches) + 1):
                for layer in layers:
                    columns[layer].append(gradient[layer].cpu())
                progress(done, total)
            factors = [small_factor(columns.pop(layer)) for layer in layers]
            found.append([[distance(r[:, a], r[:, b], self.k) for a, b in splits] for r in factors])
        return layer_scores(layers, torch.tensor(found, dtype=torch.float64), len(batches))

    def _check_ranks(self, sent: Exchange, layers: Sequence[str]) -> None:
        for layer in layers:
            weights = sent.parameters[weight_of(layer)].numel()
            if weights < self.k:
                raise LayerMetricError(
                    f"layer {layer} has {weights} weights, in which no {self.k} directions fit: "
                    f"lower k, or choose other layers"
                )


Split = tuple[list[int], list[int]]
"""Columns of the two matrices that are compared."""


def comparisons(n: int, permutations: int, seed: int) -> list[Split]:
    """Which of ``4 n`` columns are compared: kinds, within each kind, then permuted labels.

    The first ``2 n`` columns have the property. The kinds are compared by the first ``n`` of
    each, and the permutations deal out just these.
    """
    first, second = list(range(n)), list(range(n, 2 * n))
    other, last = [2 * n + i for i in first], [2 * n + i for i in second]
    splits: list[Split] = [(first, other), (first, second), (other, last)]
    for i in range(permutations):
        order = torch.randperm(2 * n, generator=generator(seed, "permuted labels", i)).tolist()
        dealt = [(first + other)[j] for j in order]
        splits.append((dealt[:n], dealt[n:]))
    return splits


def layer_scores(layers: tuple[str, ...], found: Tensor, n: int) -> LayerScores:
    """``found [models, layers, comparisons, 2]``, as `comparisons` lists them; ``n`` batches."""
    geodesic, chordal = found.mean(0).unbind(-1)
    null = geodesic[:, 3:]
    columns = {
        "chordal": chordal[:, 0],
        "within, geodesic": geodesic[:, 1:3].mean(1),
        "within, chordal": chordal[:, 1:3].mean(1),
        "null": null.mean(1),
        f"null, largest of {null.shape[1]}": null.amax(1),
    }
    if len(found) > 1:
        columns["standard error over models"] = found[:, :, 0, 0].std(0) / math.sqrt(len(found))
    unit = "share of the largest distance"
    return LayerScores("subspace_distance", unit, layers, geodesic[:, 0], n=n, columns=columns)

"""Empirical V-information of each layer's gradient about a property: eq. (1) of [Mo].

Mo et al.: Layer-wise Characterization of Latent Information Leakage in Federated Learning, 2020,
https://arxiv.org/abs/2010.08762.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from adversaries.layerwise.batch_gradients import (
    batch_size_of,
    chosen_layers,
    global_models,
    gradients_of,
)
from adversaries.layerwise.families import Family, Floats, families
from adversaries.layerwise.property_batches import (
    Batches,
    BatchSize,
    PropertyName,
    draw_batches,
    models_of,
)
from adversaries.layerwise.usable_information import (
    UsableInformation,
    in_sample_information,
    permuted,
    usable_information,
)
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.seeding import derive_seed
from fl_privacy.types import LayerScores, Observation, PositiveInt, Samples


def pooled(gradient: Tensor) -> Tensor:
    """A weight's gradient as [Melis] describe it: sizes, pooled over kernels, of length 1.

    A convolution ``[out, in, ...]`` by the maximum over its kernel, a dense matrix of more than
    5,000 entries by that over its inputs; flat.
    """
    sizes = gradient.abs()
    if sizes.ndim > 2:
        sizes = sizes.flatten(2).amax(2)
    elif sizes.numel() > 5000:
        sizes = sizes.amax(1)
    return F.normalize(sizes.flatten(), dim=0)


DESCRIPTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "pooled": pooled,
    "raw": lambda gradient: gradient.flatten(),
}


@dataclass(frozen=True)
class LayerInformation:
    """What was told of the property, of permuted labels, and by eq. (1) to the letter."""

    told: UsableInformation
    null: tuple[float, ...]
    literal: float


class VInformation(Component):
    """How many nats of a property a family of classifiers reads off each layer's gradient.

    In each of ``folds`` groups of people ``batches`` batches have the property and as many have
    it not; each is taken at a recorded global model. A family that was shown the other groups
    predicts which is which (`usable_information`). The value is the mean over all batches, signed:
    where nothing can be told it scatters around zero, a little below.

    Beside it the value cut at zero, the ``ceiling`` (ln 2, as both are equally many), the same
    with labels permuted within the groups (mean, and largest of ``permutations``: with 19 of
    them a value above is significant at 5 %), the standard error over folds, and eq. (1) to the
    letter, in-sample, which cannot tell noise from signal. Folds of one run are no independent
    repeats, so there is no interval: that takes repeated runs (20 in [Mo]).
    """

    needs: ClassVar[Literal["updates", "property", "data"]] = "property"

    property: PropertyName = ""
    family: Annotated[Family, Field(description="who reads the gradient")] = "forest"
    features: Annotated[
        Literal["pooled", "raw"], Field(description="pooled: as [Melis]; raw: every entry")
    ] = "pooled"
    batch_size: BatchSize = None
    batches: Annotated[
        PositiveInt, Field(description="with the property, and as many without, in each fold")
    ] = 20
    folds: Annotated[int, Field(ge=3, description="groups of people, tested in turn")] = 5
    permutations: Annotated[PositiveInt, Field(description="of labels, for the null")] = 19
    trees: Annotated[PositiveInt, Field(description="in the forest")] = 50
    layers: Annotated[tuple[str, ...], Field(description="layers to measure; none: all")] = ()

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores:
        """In nats.

        Raises:
            LayerMetricError: no observation, no usable property, too few samples, or an unknown
                layer.
        """
        models = global_models(observations)
        layers = chosen_layers(observations[0], self.layers)
        size = batch_size_of(observations[0], self.batch_size)
        batches = draw_batches(
            samples, self.property, folds=self.folds, batches=self.batches, size=size, seed=seed
        )
        assert samples is not None, "draw_batches refuses none"
        steps = len(batches) + len(layers) * (1 + self.permutations)
        rows: dict[str, list[Tensor]] = {layer: [torch.empty(0)] * len(batches) for layer in layers}
        gradients = gradients_of(
            observations,
            layers,
            samples,
            list(batches.indices),
            models_of(batches, len(models)).tolist(),
            device=device,
            seed=seed,
        )
        for done, (i, gradient) in enumerate(gradients, 1):
            for layer in layers:
                rows[layer][i] = DESCRIPTIONS[self.features](gradient[layer]).cpu()
            progress(done, steps)
        found = []
        for number, layer in enumerate(layers):
            features = torch.stack(rows.pop(layer)).double().numpy()
            found.append(self.of_layer(features, batches, seed=derive_seed(seed, layer)))
            progress(len(batches) + (number + 1) * (1 + self.permutations), steps)
        return layer_scores(layers, found, len(batches))

    def of_layer(self, features: Floats, batches: Batches, *, seed: int) -> LayerInformation:
        """One layer's information from ``features [n, d]`` of its gradients, and its nulls."""
        labels, groups = batches.has.numpy(), batches.folds.numpy()
        family = families(self.trees)[self.family]
        told = usable_information(features, labels, groups, family, seed=seed)
        shuffled = [
            permuted(labels, groups, seed=derive_seed(seed, "permutation", i))
            for i in range(self.permutations)
        ]
        null = [usable_information(features, y, groups, family, seed=seed).value for y in shuffled]
        literal = in_sample_information(features, labels, family, seed=seed)
        return LayerInformation(told, tuple(null), literal)


def layer_scores(layers: tuple[str, ...], found: Sequence[LayerInformation], n: int) -> LayerScores:
    """The signed values in nats, and everything beside them; ``n`` batches."""
    value = torch.tensor([one.told.value for one in found], dtype=torch.float64)
    null = torch.tensor([one.null for one in found], dtype=torch.float64)
    columns = {
        "at least 0": value.clamp_min(0),
        "ceiling": torch.tensor([one.told.ceiling for one in found]),
        "permuted labels, mean": null.mean(1),
        f"permuted labels, largest of {null.shape[1]}": null.amax(1),
        "standard error over folds": torch.tensor([one.told.standard_error for one in found]),
        "in-sample, eq. (1) to the letter": torch.tensor([one.literal for one in found]),
    }
    return LayerScores("v_information", "nats", layers, value, n=n, columns=columns)

"""Empirical V-information of each layer's gradient about a property: eq. (1) of [Mo].

Mo et al.: Layer-wise Characterization of Latent Information Leakage in Federated Learning, 2020,
https://arxiv.org/abs/2010.08762.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from adversaries.gradient_features import Family, pooled
from adversaries.layerwise.batch_gradients import (
    batch_size_of,
    chosen_layers,
    global_models,
    gradients_of,
)
from adversaries.layerwise.families import Floats, families
from adversaries.layerwise.property_batches import (
    Batches,
    BatchSize,
    Draws,
    PropertyName,
    distinct,
    models_of,
    values_of,
)
from adversaries.layerwise.sensitivity_table import Layers, checked
from adversaries.layerwise.usable_information import (
    UsableInformation,
    in_sample_information,
    usable_information,
)
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.seeding import derive_seed
from fl_privacy.types import LayerScores, Observation, PositiveInt, Samples

DESCRIPTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda gradient: F.normalize(pooled(gradient[None])[0], dim=0),
    "raw": lambda gradient: gradient.flatten(),
}


class VInformation(Component):
    """How many nats of a property a family of classifiers reads off each layer's gradient.

    In each of ``folds`` groups of people ``batches`` batches have the property and as many have
    it not; each is taken at a recorded global model. A family that was shown the other groups
    predicts which is which (`usable_information`). The value is the mean over all batches, signed:
    where nothing can be told it scatters around zero, a little below.

    Beside it the value cut at zero, the ``ceiling`` (ln 2, as both are equally many), the
    standard error over folds, eq. (1) to the letter, in-sample, which cannot tell noise from
    signal, and the ``null``: all of it again with the property dealt out anew among people
    (`dealt_anew`; mean, and largest of ``permutations``: with 19 of them a value above is
    significant at 5 %). To shuffle it among samples, or the labels of batches, would not do, as
    one person's samples are alike and batches share samples. Where people are not known it is
    dealt among samples: a value above the null may then be that of recognized people.

    Last come how many distinct samples of each kind the batches hold and of how many people:
    what a value rests on, however many batches ``n`` were drawn of them. Folds of one run are no
    independent repeats, so there is no interval: that takes repeated runs (20 in [Mo]).
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
    permutations: Annotated[
        PositiveInt, Field(description="deals of the property, for the null")
    ] = 19
    trees: Annotated[PositiveInt, Field(description="in the forest")] = 50
    layers: Layers = ()

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
            LayerMetricError: no observation, samples that do not fit the task, no usable property,
                too few samples or people, or an unknown layer.
        """
        data = checked(samples, observations)
        layers = chosen_layers(observations[0], self.layers)
        size = batch_size_of(observations[0], self.batch_size)
        values = values_of(data, self.property)
        draws = Draws(values, data.people, self.folds, self.batches, size)
        family = families(self.trees)[self.family]
        found: list[list[UsableInformation]] = [[] for _ in range(1 + self.permutations)]
        literal, held = list[float](), draws.told(seed)
        for number, told in enumerate(found):
            own = derive_seed(seed, "v-information", number)
            batches = draws.untold(own) if number else held
            labels, groups = batches.has.numpy(), batches.folds.numpy()
            described = self.described(observations, layers, data, batches, device, own)
            for features in described:
                told.append(usable_information(features, labels, groups, family, seed=own))
                if not number:
                    literal.append(in_sample_information(features, labels, family, seed=own))
                progress(number * len(layers) + len(told), len(found) * len(layers))
        return layer_scores(layers, found, literal, len(held), distinct(held, data.people))

    def described(
        self,
        observations: Sequence[Observation],
        layers: Sequence[str],
        samples: Samples,
        batches: Batches,
        device: torch.device,
        seed: int,
    ) -> list[Floats]:
        """Of each layer, features ``[n, d]`` of the gradients of the batches."""
        at = models_of(batches, len(global_models(observations))).tolist()
        indices = list(batches.indices)
        rows: list[list[Tensor]] = [[torch.empty(0)] * len(batches) for _ in layers]
        for i, gradient in gradients_of(
            observations, layers, samples, indices, at, device=device, seed=seed
        ):
            for row, layer in zip(rows, layers, strict=True):
                row[i] = DESCRIPTIONS[self.features](gradient[layer]).cpu()
        return [torch.stack(row).double().numpy() for row in rows]


def layer_scores(
    layers: tuple[str, ...],
    found: Sequence[Sequence[UsableInformation]],
    literal: Sequence[float],
    n: int,
    held: Mapping[str, int],
) -> LayerScores:
    """The signed values in nats, and everything beside them; ``n`` batches, which ``held`` so many.

    The first of ``found`` is about the property, the others about one that means nothing.
    """
    values = torch.tensor([[one.value for one in told] for told in found], dtype=torch.float64)
    value, null = values[0], values[1:]
    beside = [
        (one.ceiling, one.standard_error, own) for one, own in zip(found[0], literal, strict=True)
    ]
    ceiling, error, in_sample = torch.tensor(beside, dtype=torch.float64).unbind(1)
    columns = {
        "at least 0": value.clamp_min(0),
        "ceiling": ceiling,
        "null": null.mean(0),
        f"null, largest of {len(null)}": null.amax(0),
        "standard error over folds": error,
        "in-sample, eq. (1) to the letter": in_sample,
        **{name: torch.full_like(value, count) for name, count in held.items()},
    }
    return LayerScores("v_information", "nats", layers, value, n=n, columns=columns)

"""The analytic attack: a dense layer with a bias gives its input away exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar

import torch
from torch import nn

from adversaries.matching import Chunk, attack_chunks, box
from adversaries.targets import Unattackable
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import Failure, Observation, Outcome, Reconstruction


class Analytic(Component):
    """Divide: ``x = (dL/dW_i) / (dL/db_i)`` for any row ``i`` with ``dL/db_i != 0``.

    Geiping et al., NeurIPS 2020, proposition 3.1. The row with the largest bias
    gradient is used, in float64. Needs a network whose first layer is dense with a
    bias and sees the flattened input, and one image a batch (a row of a larger batch
    holds a mixture).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"local_training"})

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Reconstruction | Failure]:
        """Solve each target in closed form; nothing is random and ``device`` is not used."""

        def solve(chunk: Chunk) -> list[Reconstruction | Failure]:
            start = time.perf_counter()
            try:
                results = list(solve_first_layer(chunk))
            except Unattackable as error:
                return [Failure(target.key, str(error)) for target in chunk.targets]
            progress(chunk.done + len(results), len(observations))
            share = (time.perf_counter() - start) / len(results)
            return [replace(result, seconds=share) for result in results]

        yield from attack_chunks(observations, 1, solve)


def solve_first_layer(chunk: Chunk) -> Iterator[Reconstruction]:
    """The exact input of the first layer, one image for each target.

    Raises:
        Unattackable: the network or the batch does not allow it.
    """
    task = chunk.observation.task
    name = first_dense_layer(chunk.model, prod(task.input_shape))
    if chunk.images != 1:
        raise Unattackable(
            f"the batch holds {chunk.images} images and a row of {name}.weight mixes them: "
            f"expected one image"
        )
    for target in chunk.targets:
        if f"{name}.weight" not in target.observed[0] or f"{name}.bias" not in target.observed[0]:
            raise Unattackable(f"the gradient of {name} is withheld")
        weight = target.observed[0][f"{name}.weight"]
        bias = target.observed[0][f"{name}.bias"].double()
        row = bias.abs().argmax()
        if bias[row] == 0:
            raise Unattackable(f"the bias gradient of {name} is zero everywhere")
        inputs = (weight[row] / bias[row]).float().view(1, *task.input_shape)
        yield Reconstruction(
            key=target.key,
            inputs=task.denormalize(inputs.clamp(*box(task, inputs))),
            labels=target.labels,
            outcome=Outcome("completed"),
        )


def first_dense_layer(model: nn.Module, features: int) -> str:
    """Name of the first layer with weights, which must be dense, biased, ``features`` wide."""
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Linear) and module.bias is not None:
            if module.in_features == features:
                return str(name)
            found = f"a Linear of {module.in_features} inputs"
        else:
            found = type(module).__name__ + (
                " without bias" if isinstance(module, nn.Linear) else ""
            )
        raise Unattackable(
            f"the first layer with weights is {name} ({found}): expected a Linear with a bias on "
            f"the {features} input values; gradient_similarity has no such condition"
        )
    raise Unattackable("the network has no layer with weights")

"""Deep Leakage from Gradients (DLG): Zhu, Liu, Han, NeurIPS 2019."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad_and_value, vmap

from adversaries import lbfgs
from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import squared_distance
from fl_privacy.types import PositiveInt, Tensors


class DLG(GradientMatching):
    """Search inputs and soft labels together, by L-BFGS on the squared distance (eq. 1).

    ``labels="joint"`` is the paper's attack: each image's label is a softmax over free
    logits. ``labels="inferred"`` keeps the labels that were inferred (or granted) and
    searches the inputs alone, which is iDLG for a single image (Zhao, Mopuri, Bilen,
    2020). ``iterations`` times ``inner`` is the number of evaluations, as one outer
    iteration of the authors' optimizer makes up to 20. Deviations: a weak Wolfe line
    search for each lane instead of fixed steps, and float64, without which L-BFGS stalls
    long before the picture is sharp.
    """

    iterations: Annotated[PositiveInt, Field(description="outer iterations")] = 300
    inner: Annotated[PositiveInt, Field(description="evaluations in each")] = 20
    memory: Annotated[PositiveInt, Field(description="steps that L-BFGS remembers")] = 40
    labels: Annotated[
        Literal["joint", "inferred"], Field(description="search soft labels too, or keep them")
    ] = "joint"
    dtype: Annotated[Literal["float32", "float64"], Field(description="precision")] = "float64"

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Squared Euclidean distance, eq. 1."""
        return squared_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """L-BFGS over the flattened unknowns of each lane."""
        joint = self.labels == "joint"
        lanes, shape = len(inputs), inputs.shape[1:]
        images, classes = shape[0], problem.batch.task.classes
        start = inputs.flatten(1)
        if joint:
            logits = problem.draw((images, classes), "initial logits")
            start = torch.cat([start, logits.flatten(1)], 1)

        def objective(unknown: Tensor, known: Tensor, seen: object) -> Tensor:
            x = unknown[: inputs[0].numel()].view(shape)
            free = unknown[inputs[0].numel() :].view(images, -1)
            labels = free.softmax(1) if joint else known
            return problem.objective(x, labels, seen)  # type: ignore[arg-type]

        def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
            gradient, values = vmap(grad_and_value(objective))(
                points, problem.batch.labels, problem.seen
            )
            return gradient, values

        def outer(done: int, values: Tensor) -> None:
            if done % self.inner == 0:
                advance(done // self.inner, values)

        points, values = lbfgs.minimize(
            evaluate,
            start,
            evaluations=self.iterations * self.inner + 1,
            memory=self.memory,
            advance=outer,
        )
        found = points[:, : inputs[0].numel()].view(lanes, *shape)
        free = points[:, inputs[0].numel() :].view(lanes, images, -1)
        return Found(found, free.argmax(2) if joint else problem.batch.labels, values)

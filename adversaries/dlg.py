"""Deep Leakage from Gradients (DLG): Zhu, Liu, Han, NeurIPS 2019."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import squared_distance
from adversaries.quasi_newton import minimize
from fl_privacy.types import PositiveInt, Tensors


class DLG(GradientMatching):
    """Search inputs and soft labels together, by L-BFGS on the squared distance (eq. 1).

    Each image's label is a softmax over free logits, so labels are neither inferred nor
    used when granted; `adversaries.idlg` keeps them. ``iterations`` times ``inner`` is the
    number of evaluations, as one outer iteration of the authors' optimizer makes up to 20.
    Deviations: a weak Wolfe line search for each lane instead of fixed steps, and float64,
    without which L-BFGS stalls long before the picture is sharp.
    """

    iterations: Annotated[PositiveInt, Field(description="outer iterations")] = 300
    inner: Annotated[PositiveInt, Field(description="evaluations in each")] = 20
    memory: Annotated[PositiveInt, Field(description="steps that L-BFGS remembers")] = 40
    dtype: Annotated[Literal["float32", "float64"], Field(description="precision")] = "float64"

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Squared Euclidean distance, eq. 1."""
        return squared_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """L-BFGS over the inputs and the logits of each lane, flattened."""
        shape, size = inputs.shape[1:], inputs[0].numel()
        logits = problem.draw((shape[0], problem.batch.task.classes), "initial logits")

        def read(unknown: Tensor, _known: Tensor) -> tuple[Tensor, Tensor]:
            return unknown[:size].view(shape), unknown[size:].view_as(logits[0]).softmax(1)

        start = torch.cat([inputs.flatten(1), logits.flatten(1)], 1)
        points, values = minimize(problem, start, read, self, advance)
        labels = points[:, size:].view_as(logits).argmax(2)
        return Found(points[:, :size].view_as(inputs), labels, values)

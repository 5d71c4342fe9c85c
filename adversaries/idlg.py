"""Improved Deep Leakage from Gradients (iDLG): Zhao, Mopuri, Bilen, 2020."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import squared_distance
from adversaries.quasi_newton import minimize
from fl_privacy.types import PositiveInt, Tensors


class IDLG(GradientMatching):
    """DLG with the label read off the gradient: L-BFGS searches the inputs alone.

    The label of one image is exact (section 3.1; `adversaries.labels.single_label`). Beyond
    the paper, the labels of a batch are counted, and labels that the threat model grants
    are taken. Line search and float64 as in `adversaries.dlg`.
    """

    iterations: Annotated[PositiveInt, Field(description="outer iterations")] = 300
    inner: Annotated[PositiveInt, Field(description="evaluations in each")] = 20
    memory: Annotated[PositiveInt, Field(description="steps that L-BFGS remembers")] = 40
    dtype: Annotated[Literal["float32", "float64"], Field(description="precision")] = "float64"

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Squared Euclidean distance: algorithm 1, as in DLG."""
        return squared_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """L-BFGS over the inputs of each lane, flattened; the labels stay."""

        def read(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
            return unknown.view_as(inputs[0]), known

        points, values = minimize(problem, inputs.flatten(1), read, self, advance)
        return Found(points.view_as(inputs), problem.batch.labels, values)

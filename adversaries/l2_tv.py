"""Euclidean distance of gradients with total variation, by Adam."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import relative_distance
from adversaries.signed_adam import minimize
from fl_privacy.types import NonNegativeFloat, PositiveFloat, Tensors


class L2TV(GradientMatching):
    """Match the gradient itself, not only its direction.

    Minimizes ``|g(x) - g*|^2 / |g*|^2 + tv * TV(x)``: the distance of Zhu et al. (NeurIPS
    2019, eq. 1) made free of units, with the image prior and the optimizer of Geiping et
    al. (NeurIPS 2020). Unlike the cosine it uses the gradient's length, which clipping
    destroys.
    """

    tv: Annotated[NonNegativeFloat, Field(description="weight of the total variation")] = 2e-3
    lr: Annotated[PositiveFloat, Field(description="first step size, normalized units")] = 0.1
    signed: Annotated[bool, Field(description="feed Adam the sign of the gradient")] = True
    boxed: Annotated[bool, Field(description="clamp to the pixel range after each step")] = True

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Squared distance over the squared length of the observed gradient."""
        return relative_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """Signed Adam on the inputs."""
        return minimize(problem, inputs, self, advance)

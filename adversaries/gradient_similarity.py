"""Gradient similarity (GS): Geiping et al., "Inverting Gradients", NeurIPS 2020."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import cosine_distance, normalized
from adversaries.signed_adam import minimize
from fl_privacy.types import NonNegativeFloat, PositiveFloat, Tensors


class GradientSimilarity(GradientMatching):
    """Match the direction of the gradient, with total variation as image prior.

    Minimizes ``1 - cosine(g(x), g*) + tv * TV(x)`` (eq. 4) by Adam on the sign of the
    gradient, in a box, with the step divided by ten after 3/8, 5/8 and 7/8 of the
    iterations (appendix A). The default ``tv`` was chosen on training images that no
    published figure of ours uses.
    """

    tv: Annotated[NonNegativeFloat, Field(description="weight of the total variation")] = 2e-3
    lr: Annotated[PositiveFloat, Field(description="first step size, normalized units")] = 0.1
    signed: Annotated[bool, Field(description="feed Adam the sign of the gradient")] = True
    boxed: Annotated[bool, Field(description="clamp to the pixel range after each step")] = True
    compiled: Annotated[
        bool, Field(description="compile the step: pays off above some 4,000 iterations")
    ] = False

    def scale(self, observed: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
        """Observed gradients of unit norm, lane by lane: the cosine needs no more."""
        return tuple(normalized(one) for one in observed)

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """``1 - cosine``, ``observed`` being of unit norm."""
        return cosine_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """Signed Adam on the inputs."""
        return minimize(problem, inputs, self, advance, compiled=self.compiled)

"""The plain approximation: an update of several local steps taken for one gradient."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import cosine_distance, normalized
from adversaries.signed_adam import minimize
from fl_privacy.types import NonNegativeFloat, PositiveFloat, Tensors


class UpdateOverLR(GradientMatching):
    """Gradient similarity on ``-update / lr``, as if the client had taken a single step.

    What many attacks on FedAvg do, and the yardstick for unrolling the steps: right for one
    step, where it equals `adversaries.gradient_similarity`, and the worse the further the
    weights move on the client (Geiping et al., NeurIPS 2020, section 6).
    """

    local_steps: Annotated[Literal["ignore"], Field(description="what this attack is")] = "ignore"
    tv: Annotated[NonNegativeFloat, Field(description="weight of the total variation")] = 2e-3
    lr: Annotated[PositiveFloat, Field(description="first step size, normalized units")] = 0.1
    signed: Annotated[bool, Field(description="feed Adam the sign of the gradient")] = True
    boxed: Annotated[bool, Field(description="clamp to the pixel range after each step")] = True

    def scale(self, observed: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
        """Observed updates of unit norm, lane by lane: the cosine needs no more."""
        return tuple(normalized(one) for one in observed)

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """``1 - cosine``, ``observed`` being of unit norm."""
        return cosine_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """Signed Adam on the inputs."""
        return minimize(problem, inputs, self, advance)

"""The most probable inputs under noise that the adversary knows: Balunovic et al., ICLR 2022."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.objectives import absolute_distance, squared_distance
from adversaries.signed_adam import minimize
from fl_privacy.types import NonNegativeFloat, PositiveFloat, Tensors


class Likelihood(GradientMatching):
    """Maximize ``log p(gradient | x) + log p(x)``, the noise on the gradient being known.

    "Bayesian Framework for Gradient Leakage": Gaussian noise makes the first term
    the squared distance over ``2 noise_scale^2``, Laplacian noise the L1 distance over
    ``noise_scale``, added over all entries and linked rounds. The prior takes differences of
    neighbors for independent Laplacian ones (total variation, which the paper names beside
    others); ``tv`` is one over their mean in units of the inputs' standard deviation, which is
    0.22 for the training images of CIFAR-10 and Fashion-MNIST. So the weight of the prior
    follows from the noise and is not tuned. The sum is divided by the number of input values. By
    Adam on the sign of the gradient, as `adversaries.gradient_similarity`.
    """

    noise: Annotated[Literal["gaussian", "laplace"], Field(description="distribution")] = "gaussian"
    noise_scale: Annotated[
        PositiveFloat, Field(description="standard deviation, or b of Laplace; gradient units")
    ] = 1e-2
    tv: Annotated[NonNegativeFloat, Field(description="one over the mean step of neighbors")] = 4.5
    lr: Annotated[PositiveFloat, Field(description="first step size, normalized units")] = 0.1
    signed: Annotated[bool, Field(description="feed Adam the sign of the gradient")] = True
    boxed: Annotated[bool, Field(description="clamp to the pixel range after each step")] = True

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Minus the log-likelihood of the observed gradient, up to a constant."""
        if self.noise == "gaussian":
            return squared_distance(simulated, observed) / (2 * self.noise_scale**2)
        return absolute_distance(simulated, observed) / self.noise_scale

    def trust(self, inputs: Tensor, rounds: int) -> float:
        """Likelihoods of rounds multiply; the prior's logarithm is ``tv`` for each input value."""
        return rounds / inputs.numel()

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """Signed Adam on the inputs."""
        return minimize(problem, inputs, self, advance)

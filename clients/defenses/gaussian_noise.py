"""Gaussian noise on the update, as in the baselines of gradient-inversion papers.

Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019, section 5.1,
https://arxiv.org/abs/1906.08935. "DP-Gaussian" of Sun et al. (Soteria), CVPR 2021,
https://arxiv.org/abs/2012.06043. No clipping, hence no differential-privacy guarantee.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from clients.defenses.additive_noise import add_noise
from fl_privacy.component import Component
from fl_privacy.types import NonNegativeFloat, Stats, Tensors


class GaussianNoise(Component):
    """Adds independent N(0, ``scale``^2) noise to every entry of the update.

    ``scale`` is the standard deviation, not the variance, in **weight units**, those of the
    update (returned minus sent). The papers' scales are in gradient units: a FedSGD update is
    ``-lr * gradient``, so ``scale = lr * scale_of_the_paper`` (1e-2 on gradients at lr 0.1 is
    1e-3); ``each_step(defense='gaussian_noise(scale=1e-2)')`` takes gradient units as they are.
    Soteria's text calls its sigma (1e-4 to 1e-1) the variance, the authors' code uses it as the
    standard deviation, and so do we.
    """

    scale: Annotated[NonNegativeFloat, Field(description="standard deviation, in weight units")]

    def without_noise(self) -> None:
        """Nothing is left."""

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The noisy update, see `add_noise`."""
        return add_noise(
            update, standard_normal, scale=self.scale, deviation=self.scale, generator=generator
        )


def standard_normal(shape: torch.Size, generator: Generator) -> Tensor:
    """N(0, 1) of ``shape``, float32 on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)

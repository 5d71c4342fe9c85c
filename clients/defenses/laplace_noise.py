"""Laplacian noise on the update, as in the baselines of gradient-inversion papers.

Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019, section 5.1,
https://arxiv.org/abs/1906.08935. "DP-Laplace" of Sun et al. (Soteria), CVPR 2021,
https://arxiv.org/abs/2012.06043. No clipping, hence no differential-privacy guarantee.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from clients.defenses.additive_noise import add_noise
from fl_privacy.component import Component
from fl_privacy.types import NonNegativeFloat, Stats, Tensors


class LaplaceNoise(Component):
    """Adds independent Laplace(0, ``scale``) noise to every entry of the update.

    ``scale`` is the parameter b of the density ``exp(-|x| / b) / 2b`` (the standard deviation is
    ``sqrt(2) b``), in **weight units**, those of the update (returned minus sent). Scales of the
    papers are in gradient units: multiply by the learning rate, or use
    ``each_step(defense='laplace_noise(scale=1e-2)')``. Soteria's text gives one sigma (1e-4 to
    1e-1) for both noises and calls it the variance; here it is b.
    """

    scale: Annotated[NonNegativeFloat, Field(description="b of the density, in weight units")]

    def without_noise(self) -> None:
        """Nothing is left."""

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The noisy update, see `add_noise`."""
        return add_noise(
            update,
            standard_laplace,
            scale=self.scale,
            deviation=math.sqrt(2) * self.scale,
            generator=generator,
        )


def standard_laplace(shape: torch.Size, generator: Generator) -> Tensor:
    """Laplace(0, 1) of ``shape``, float32 on the CPU: the difference of two exponentials."""
    draws = torch.empty(2, *shape, dtype=torch.float32).exponential_(generator=generator)
    return draws[0] - draws[1]

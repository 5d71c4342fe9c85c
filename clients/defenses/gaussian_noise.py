"""Gaussian noise on the update, as in the baselines of gradient-inversion papers.

Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019, section 5.1,
https://arxiv.org/abs/1906.08935. No clipping, hence no differential-privacy guarantee.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from fl_privacy.component import Component
from fl_privacy.types import NonNegativeFloat, Stats, Tensors


class GaussianNoise(Component):
    """Adds independent N(0, ``scale``^2) noise to every entry of the update.

    ``scale`` is the standard deviation in **weight units**, those of the update (returned
    minus sent). The papers' scales are in gradient units: a FedSGD update is ``-lr *
    gradient``, so ``scale = lr * scale_of_the_paper`` (1e-2 on gradients at lr 0.1 is 1e-3).
    """

    scale: NonNegativeFloat

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The noisy update; norms of update and noise, and their ratio ``snr``.

        Noise is drawn on the CPU from ``generator`` in the order of ``update``, so it is the
        same on every device; the result is differentiable in ``update``.
        """
        noisy = {}
        for name, value in update.items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            noisy[name] = value + self.scale * noise.to(value)
        norm = global_norm(update)
        expected = self.scale * math.sqrt(sum(value.numel() for value in update.values()))
        stats = {"update_norm": norm, "expected_noise_norm": torch.tensor(expected)}
        return noisy, stats | ({"snr": norm / expected} if expected else {})


def global_norm(tensors: Tensors) -> Tensor:
    """L2 norm over all entries of all tensors, detached."""
    squares = [value.detach().square().sum() for value in tensors.values()]
    return torch.stack(squares).sum().sqrt()

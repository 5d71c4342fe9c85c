"""Gaussian noise on the update, as in the baselines of gradient-inversion papers.

Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019, section 5.1,
https://arxiv.org/abs/1906.08935. No clipping, hence no differential-privacy guarantee.
"""

from __future__ import annotations

import math

import torch
from torch import Generator

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
        """The noisy update and its signal-to-noise ratio.

        Noise is drawn on the CPU from ``generator`` in the order of ``update``, so it is the
        same on every device; the result is differentiable in ``update``.
        """
        noisy = {}
        for name, value in update.items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            noisy[name] = value + self.scale * noise.to(value)
        entries = sum(value.numel() for value in update.values())
        signal = math.sqrt(sum(float(value.detach().square().sum()) for value in update.values()))
        noise_norm = self.scale * math.sqrt(entries)
        snr = signal / noise_norm if noise_norm else math.inf
        return noisy, {"update_norm": signal, "expected_noise_norm": noise_norm, "snr": snr}

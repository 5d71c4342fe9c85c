"""What the noise defenses share: an independent draw for every entry of the update."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from clients.defenses.norms import global_norm
from fl_privacy.types import Stats, Tensors

Draw = Callable[[torch.Size, Generator], Tensor]
"""Independent float32 noise of unit scale and a given shape, on the CPU."""


def add_noise(
    update: Tensors, draw: Draw, *, scale: float, deviation: float, generator: Generator
) -> tuple[Tensors, Stats]:
    """``update`` plus ``scale`` times ``draw``; norms of update and noise, their ratio ``snr``.

    ``deviation`` is the standard deviation of the scaled noise. It is drawn on the CPU in the
    order of ``update``, so it is the same on every device; the result is differentiable in
    ``update``.
    """
    noisy = {
        name: value + scale * draw(value.shape, generator).to(value)
        for name, value in update.items()
    }
    norm = global_norm(update).detach()
    expected = deviation * math.sqrt(sum(value.numel() for value in update.values()))
    stats = {"update_norm": norm, "expected_noise_norm": torch.tensor(expected)}
    return noisy, stats | ({"snr": norm / expected} if expected else {})

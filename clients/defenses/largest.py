"""Which entries of an update are its largest: exactly so many, ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.types import Stats, Tensors


def largest(values: Tensor, keep: int) -> Tensor:
    """Mask ``[n]`` of the ``keep`` entries of ``values [n]`` of largest magnitude.

    Of equal ones the first; NaN counts as infinitely large. Works under ``torch.func``: what
    it gives is constant in ``values``.
    """
    if keep <= 0 or keep >= len(values):
        return torch.full_like(values, keep > 0, dtype=torch.bool)
    size = values.detach().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    threshold = size.kthvalue(len(values) - keep + 1).values
    above, at = size > threshold, size == threshold
    return above | (at & (at.cumsum(0) <= keep - above.sum()))


def keep_largest(update: Tensors, keep: int) -> dict[str, Tensor]:
    """``update`` with all but its ``keep`` largest entries, over all tensors, at zero."""
    flat = torch.cat([value.flatten() for value in update.values()])
    masks = torch.split(largest(flat, keep), [value.numel() for value in update.values()])
    return {
        name: masked(value, mask) for (name, value), mask in zip(update.items(), masks, strict=True)
    }


def masked(value: Tensor, mask: Tensor) -> Tensor:
    """``value`` where the flat ``mask`` is set, else exactly zero, whatever stood there."""
    return torch.where(mask.view(value.shape), value, torch.zeros_like(value))


def kept_stats(update: Tensors, kept: Tensors) -> Stats:
    """The shares of the entries and of the squared length that are left after masking."""
    before = torch.stack([value.detach().square().sum() for value in update.values()]).sum()
    after = torch.stack([value.detach().square().sum() for value in kept.values()]).sum()
    left = torch.stack([(value.detach() != 0).sum() for value in kept.values()]).sum()
    entries = sum(value.numel() for value in update.values())
    return {
        "kept_share": left / max(entries, 1),
        "kept_energy": torch.where(before > 0, after / torch.where(before > 0, before, 1.0), 1.0),
    }

"""The length of an update."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.types import Tensors


def global_norm(tensors: Tensors) -> Tensor:
    """L2 norm over all entries of all tensors, at least in float32; its slope at zero is zero."""
    wide = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in tensors.values()]
    squared = torch.stack([value.square().sum() for value in wide]).sum()
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)

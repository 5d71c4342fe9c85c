"""What gradient matching minimizes: distances between gradients, and image priors.

All are written for one target; the engine maps them over targets and restarts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.types import Tensors


def cosine_distance(simulated: Tensors, direction: Tensors) -> Tensor:
    """``1 - <g, g*> / |g|`` over all tensors together, ``g*`` of unit norm; scalar in [0, 2].

    Geiping et al., "Inverting Gradients", NeurIPS 2020, eq. 4; see `normalized`.
    """
    dot = torch.stack([(simulated[n] * direction[n]).sum() for n in direction]).sum()
    return 1 - dot * squared_norm({n: simulated[n] for n in direction}).rsqrt()


def squared_distance(simulated: Tensors, observed: Tensors) -> Tensor:
    """Squared Euclidean distance over all tensors together; scalar.

    Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019, eq. 1.
    """
    return torch.stack([(simulated[n] - observed[n]).square().sum() for n in observed]).sum()


def absolute_distance(simulated: Tensors, observed: Tensors) -> Tensor:
    """Sum of absolute differences over all tensors together; scalar.

    Balunovic et al., ICLR 2022: what Laplacian noise calls for.
    """
    return torch.stack([(simulated[n] - observed[n]).abs().sum() for n in observed]).sum()


def relative_distance(simulated: Tensors, observed: Tensors) -> Tensor:
    """`squared_distance` over the squared length of ``observed``: free of units; scalar."""
    return squared_distance(simulated, observed) / squared_norm(observed)


def normalized(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors ``[lanes, ...]`` scaled so that each lane's have norm one together."""
    squares = [t.flatten(1).square().sum(1) for t in tensors.values()]
    scale = torch.stack(squares).sum(0).rsqrt()
    return {n: t * scale.view(-1, *[1] * (t.ndim - 1)) for n, t in tensors.items()}


def squared_norm(tensors: Tensors) -> Tensor:
    """Squared Euclidean norm of all tensors together; scalar."""
    return torch.stack([(t * t).sum() for t in tensors.values()]).sum()


def total_variation(inputs: Tensor, spatial: int) -> Tensor:
    """Anisotropic total variation: mean absolute difference of neighbors.

    ``inputs [n, channels, *spatial axes]``; the means along the ``spatial`` last axes
    are added, so 1-D signals and images use the same code. An axis of length one
    contributes nothing.
    """
    terms = [
        inputs.diff(dim=-axis).abs().mean()
        for axis in range(1, spatial + 1)
        if inputs.shape[-axis] > 1
    ]
    return torch.stack(terms).sum() if terms else inputs.new_zeros(())

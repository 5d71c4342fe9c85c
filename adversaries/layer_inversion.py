"""The input of one layer from its output: inverses of activations, systems of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from adversaries.targets import Unattackable
from adversaries.tracing import Link

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EDGE, TINY = 1 - 1e-12, 1e-300

INVERSES: Mapping[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Flatten: lambda _, y: y,
    nn.Identity: lambda _, y: y,
    nn.Sigmoid: lambda _, y: torch.logit(y, eps=1 - EDGE),
    nn.Tanh: lambda _, y: torch.atanh(y.clamp(-EDGE, EDGE)),
    nn.LeakyReLU: lambda layer, y: torch.where(y > 0, y, y / layer.negative_slope),
    nn.ELU: lambda layer, y: torch.where(y > 0, y, (y / layer.alpha).clamp(min=-EDGE).log1p()),
}
"""What went into a layer, from what came out (moved to its range if rounding left it)."""


@dataclass(frozen=True)
class Solution:
    """Least squares: ``values [unknowns]``, the ``rank``, the residual over the right side."""

    values: Tensor
    rank: int
    residual: float


def system(
    link: Link, values: Tensor, trust: Tensor, slope: Tensor, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Matrix ``[equations, unknowns]`` and right side for the input of a linear layer.

    ``values``, ``trust`` and ``slope`` (flat) are the layer's output, the weight of each of
    its equations, and the gradient with respect to it; ``gradient`` is that of the layer's
    weight, or None if it is withheld.
    """
    layer, basis = link.module, torch.eye(prod(link.shape), dtype=torch.float64)
    basis = basis.view(-1, *link.shape)
    offset = layer(torch.zeros_like(basis[:1]))
    forward = (layer(basis) - offset).flatten(1).T
    blocks = [(trust[:, None] * forward, trust * (values - offset.flatten()))]
    if gradient is not None:

        def weight_gradient(inputs: Tensor) -> Tensor:
            def output(weight: Tensor) -> Tensor:
                found: Tensor = functional_call(layer, {"weight": weight}, (inputs[None],))
                return found

            found: Tensor = vjp(output, layer.weight)[1](slope.view_as(offset))[0]
            return found.flatten()

        blocks.append((vmap(weight_gradient, chunk_size=256)(basis).T, gradient.flatten()))
    norms = [matrix.norm().clamp(min=TINY) for matrix, _ in blocks]
    matrix = torch.cat([matrix / norm for (matrix, _), norm in zip(blocks, norms, strict=True)])
    return matrix, torch.cat([right / norm for (_, right), norm in zip(blocks, norms, strict=True)])


def least_squares(matrix: Tensor, right: Tensor, tolerance: float) -> Solution:
    """Solve by pivoted QR, which tells the rank at ``tolerance`` too."""
    found = torch.linalg.lstsq(matrix, right[:, None], rcond=tolerance, driver="gelsy")
    values = found.solution[:, 0]
    residual = float((matrix @ values - right).norm() / right.norm().clamp(min=TINY))
    return Solution(values, int(found.rank), residual)


def inverse(link: Link, outputs: Tensor) -> Tensor:
    """What went into a layer without weights.

    Raises:
        Unattackable: the layer loses something; the message names it.
    """
    kind = type(link.module)
    if kind not in INVERSES or getattr(link.module, "negative_slope", 1) == 0:
        known = ", ".join(sorted(k.__name__ for k in (*LINEAR, *INVERSES)))
        raise Unattackable(
            f"{link} cannot be inverted: expected only {known} before the first dense layer with "
            f"a bias; gradient_similarity has no such condition"
        )
    return INVERSES[kind](link.module, outputs)

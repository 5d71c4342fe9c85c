"""Norms and extremes of weight gradients that are products, formed only where they must be.

A gradient is ``back @ seen^T`` of ``[n, groups, units, positions]`` and ``[n, groups, inputs,
positions]`` (see `sample_gradients`). With one position it is an outer product, whose norms are
products of norms: for a dense layer nothing of the size of its weight is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adversaries.layerwise.sample_gradients import product


class Sums(NamedTuple):
    """What norms and ranges need of gradients: all four of one shape, such as ``[n]``."""

    squares: Tensor
    absolutes: Tensor
    lowest: Tensor
    highest: Tensor


def is_outer(back: Tensor) -> bool:
    """Whether the gradient is an outer product: one position, one group."""
    return back.shape[1] == 1 and back.shape[-1] == 1


def of_vectors(vectors: Tensor) -> Sums:
    """Of gradients that stand there: ``[n, weights]``."""
    squares = torch.linalg.vector_norm(vectors, dim=1).square()
    absolutes = torch.linalg.vector_norm(vectors, ord=1, dim=1)
    return Sums(squares, absolutes, vectors.amin(1), vectors.amax(1))


def of_factors(back: Tensor, seen: Tensor) -> Sums:
    """Of gradients that are products."""
    if not is_outer(back):
        return of_vectors(product(back, seen))
    one, other = of_vectors(back.flatten(1)), of_vectors(seen.flatten(1))
    corners = torch.stack([a * b for a in one[2:] for b in other[2:]])
    lowest, highest = corners.aminmax(dim=0)
    return Sums(one.squares * other.squares, one.absolutes * other.absolutes, lowest, highest)


def change(back: Tensor, seen: Tensor, back_change: Tensor, seen_change: Tensor) -> Tensor:
    """How products change with their factors, to first order: ``[n, weights]``."""
    return product(back_change, seen) + product(back, seen_change)


def square_of_change(
    back: Tensor, seen: Tensor, back_change: Tensor, seen_change: Tensor
) -> Tensor:
    """The squared 2-norm of `change`, ``[n]``."""
    if not is_outer(back):
        moved = change(back, seen, back_change, seen_change)
        return of_vectors(moved).squares
    d, t, dd, dt = (x.flatten(1) for x in (back, seen, back_change, seen_change))
    crossed = 2 * (dd * d).sum(1) * (t * dt).sum(1)
    apart = dd.square().sum(1) * t.square().sum(1) + d.square().sum(1) * dt.square().sum(1)
    return (apart + crossed).clamp_min(0)

"""Norms and ranges of weight gradients that are products, formed only where they must be.

A gradient is ``back @ seen^T`` of ``[n, groups, units, positions]`` and ``[n, groups, inputs,
positions]`` (see `factors`). With one position it is an outer product, whose norms are
products of norms: for a dense layer nothing of the size of its weight is needed. With fewer
positions than inputs, a 2-norm takes the positions' inner products instead of the gradient.

The *size* of a gradient is what of its entrywise norm adds up over several: the sum of squares
for F, the sum of absolute values for 1; for inf, where the larger one counts, the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["F", "1", "inf"]
"""Entrywise: root of the sum of squares, sum of absolute values, largest absolute value."""


@dataclass(frozen=True)
class Seen:
    """What each position of a layer sees; where that helps, also the positions' inner products."""

    patches: Tensor
    inner: Tensor | None = None


def prepared(patches: Tensor, norm: Norm) -> Seen:
    """``patches [n, groups, inputs, positions]`` for many gradients of which a norm is taken."""
    inputs, positions = patches.shape[2:]
    if norm != "F" or not 1 < positions < inputs:
        return Seen(patches)
    return Seen(patches, patches.transpose(-1, -2) @ patches)


def norm_of(sizes: Tensor, dim: int, norm: Norm) -> Tensor:
    """The norm of several gradients together from their sizes along ``dim``."""
    if norm == "inf":
        return sizes.amax(dim)
    return sizes.sum(dim).sqrt() if norm == "F" else sizes.sum(dim)


def psi(entries: Tensor, norm: Norm) -> Tensor:
    """What norms of so many entries are divided by."""
    return {"F": entries.sqrt(), "1": entries, "inf": torch.ones_like(entries)}[norm]


def size(vectors: Tensor, norm: Norm) -> Tensor:
    """Sizes ``[n]`` of gradients that stand there, ``[n, weights]``."""
    found: Tensor = torch.linalg.vector_norm(vectors, ord=2 if norm == "F" else float(norm), dim=1)
    return found.square() if norm == "F" else found


def size_of_product(back: Tensor, seen: Seen, norm: Norm) -> Tensor:
    """Sizes ``[n]`` of gradients that are products."""
    if is_outer(back):
        return size(back.flatten(1), norm) * size(seen.patches.flatten(1), norm)
    if seen.inner is not None and norm == "F":
        return ((back @ seen.inner) * back).flatten(1).sum(1).clamp_min(0)
    return size(entries(back, seen.patches), norm)


def span(vectors: Tensor) -> Tensor:
    """Largest less smallest entry, ``[n]``, of gradients that stand there."""
    return vectors.amax(1) - vectors.amin(1)


def span_of_product(back: Tensor, seen: Seen) -> Tensor:
    """The same of gradients that are products."""
    if not is_outer(back):
        return span(entries(back, seen.patches))
    ends = [(x.flatten(1).amin(1), x.flatten(1).amax(1)) for x in (back, seen.patches)]
    return span(torch.stack([a * b for a in ends[0] for b in ends[1]], 1))


def change(back: Tensor, seen: Tensor, back_change: Tensor, seen_change: Tensor) -> Tensor:
    """The entries by which products change with their factors, to first order: ``[n, weights]``."""
    return entries(back_change, seen) + entries(back, seen_change)


def square_of_change(
    back: Tensor, seen: Tensor, back_change: Tensor, seen_change: Tensor
) -> Tensor:
    """The size for F of `change`, ``[n]``."""
    if not is_outer(back):
        return size(change(back, seen, back_change, seen_change), "F")
    d, t, dd, dt = (x.flatten(1) for x in (back, seen, back_change, seen_change))
    crossed = 2 * (dd * d).sum(1) * (t * dt).sum(1)
    apart = dd.square().sum(1) * t.square().sum(1) + d.square().sum(1) * dt.square().sum(1)
    return (apart + crossed).clamp_min(0)


def entries(back: Tensor, seen: Tensor) -> Tensor:
    """The entries of gradients that are products, ``[n, weights]``; transposed, which is faster."""
    return (seen @ back.transpose(-1, -2)).flatten(1)


def is_outer(back: Tensor) -> bool:
    """Whether the gradient is an outer product: one position, one group."""
    return back.shape[1] == 1 and back.shape[-1] == 1

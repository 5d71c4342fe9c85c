"""Distances between the subspaces that few columns span, in a space of any dimension.

Principal angles after Björck and Golub: Numerical Methods for Computing Angles Between Linear
Subspaces, Mathematics of Computation 27, 1973.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from adversaries.layerwise.families import Floats

ROWS = 1 << 16
"""Rows that are factored at once."""


class Distance(NamedTuple):
    """Between two subspaces of the same dimension: 0 for equal, 1 for orthogonal ones."""

    geodesic: float
    chordal: float


def small_factor(columns: Iterable[Tensor]) -> Floats:
    """``R [n, n]`` of a matrix of ``n`` columns ``[P]``: angles and lengths are those of columns.

    Made block of rows by block of rows, so that nothing larger than the columns is ever held.
    """
    stacked = [column.flatten() for column in columns]
    r = torch.empty(0, len(stacked), dtype=torch.float64)
    for start in range(0, len(stacked[0]), ROWS):
        block = torch.stack([column[start : start + ROWS].double().cpu() for column in stacked], 1)
        r = torch.linalg.qr(torch.cat([r, block]), mode="r").R
    return np.asarray(r.numpy())


def leading(columns: Floats, k: int) -> Floats | None:
    """The ``k`` leading left singular vectors ``[m, k]`` of ``columns [m, n]``.

    None where the rank is less, up to the rounding of float32, in which gradients come.
    """
    u, sizes, _ = scipy.linalg.svd(columns, full_matrices=False)
    least = sizes[0] * max(columns.shape) * np.finfo(np.float32).eps
    basis: Floats = u[:, :k]
    return basis if len(sizes) >= k and sizes[k - 1] > least else None


def distance(one: Floats, other: Floats, k: int) -> Distance:
    """Between the spans of the ``k`` leading left singular vectors of ``one`` and ``other``.

    With the principal angles theta the geodesic distance on the Grassmann manifold,
    ``(sum theta^2)^(1/2) / (sqrt(k) pi / 2)``, and the chordal one,
    ``(sum sin^2 theta)^(1/2) / sqrt(k)``. NaN where a rank is less than ``k``.
    """
    basis, another = leading(one, k), leading(other, k)
    if basis is None or another is None:
        return Distance(math.nan, math.nan)
    angles = scipy.linalg.subspace_angles(basis, another)
    return Distance(
        float(np.linalg.norm(angles) / (math.sqrt(k) * math.pi / 2)),
        float(np.linalg.norm(np.sin(angles)) / math.sqrt(k)),
    )

"""Certified upper bounds of the L2 operator norm of linear layers.

All norms are computed from eigenvalues, never by power iteration, which approaches a norm from
below; in float64, and rounded up by `ROUNDING`, which is far above its error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDING = 1 + 1e-9
CHUNK = 2**22
"""Complex entries of transfer matrices that are held at a time (64 MiB)."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def matrix_norm(matrix: Tensor) -> float:
    """The largest singular value of ``matrix [..., rows, columns]``, over all in the batch."""
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    if 0 in wide.shape:
        return 0.0
    wide = wide if wide.shape[-2] <= wide.shape[-1] else wide.mH
    squares = torch.linalg.eigvalsh(wide @ wide.mH)[..., -1]
    return math.sqrt(max(float(squares.max()), 0.0)) * ROUNDING


def convolution_norm(layer: Convolution, shape: tuple[int, ...]) -> float:
    """An upper bound for a zero-padded convolution of inputs of ``shape [channels, *sides]``.

    Zero padding on ``H`` points is a part of the circular convolution on any grid of at least
    ``H + max(d (k - 1), 2 p)`` points (kernel k, dilation d, padding p), whose norm is the
    largest over the grid's frequencies of the norm of the channels' transfer matrix: Sedghi,
    Gupta, Long: The Singular Values of Convolutional Layers, ICLR 2019,
    https://arxiv.org/abs/1805.10408. A stride ``s`` is exact on a grid of a multiple of ``s``
    points: sorting the input by its position modulo ``s`` keeps its norm and turns the layer
    into one of stride 1 with ``s`` times the channels.

    Raises:
        ValueError: another padding than with zeros.
    """
    if layer.padding_mode != "zeros":
        raise ValueError(f"expected padding with zeros, got {layer.padding_mode!r}")
    kernel = layer.weight.detach().double().reshape(layer.groups, -1, *layer.weight.shape[1:])
    grid = []
    for axis, side in enumerate(shape[1:]):
        size, stride, dilation = kernel.shape[3 + axis], layer.stride[axis], layer.dilation[axis]
        reach = dilation * (size - 1) + 1
        padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]
        points = side + max(reach - 1, 2 * padding)
        blocks = -(-reach // stride)
        spread = list(kernel.shape)
        spread[3 + axis] = blocks * stride
        places = torch.arange(0, reach, dilation, device=kernel.device)
        wide = kernel.new_zeros(spread).index_copy(3 + axis, places, kernel)
        phases = wide.reshape(*spread[: 3 + axis], blocks, stride, *spread[4 + axis :])
        kernel = phases.movedim(4 + axis, 2).flatten(2, 3)
        grid.append(-(-points // stride))
    return max(matrix_norm(part) for part in transfer_matrices(kernel, tuple(grid)))


def transfer_matrices(kernel: Tensor, grid: tuple[int, ...]) -> Iterator[Tensor]:
    """Of ``kernel [groups, out, in, *taps]`` at all frequencies of ``grid``, in chunks.

    Each is ``[frequencies, groups, out, in]``; of two conjugate frequencies one is left out.
    """
    half = [*grid[:-1], grid[-1] // 2 + 1]
    turns = torch.tensor(
        [[f / n for f, n in zip(at, grid, strict=True)] for at in product(*map(range, half))],
        dtype=torch.float64,
        device=kernel.device,
    )
    taps = torch.tensor(
        list(product(*map(range, kernel.shape[3:]))), dtype=torch.float64, device=kernel.device
    )
    weights = kernel.flatten(3).movedim(-1, 0)
    for some in turns.split(max(1, CHUNK // weights[0].numel())):  # type: ignore[no-untyped-call]
        phases = torch.exp(-2j * math.pi * (some @ taps.T))
        yield torch.einsum("ft,tgoi->fgoi", phases, weights.to(phases))


def batch_norm_norm(layer: nn.Module) -> float:
    """Of batch norm in eval mode, which scales each channel: the largest of its factors.

    Raises:
        ValueError: it uses the statistics of the batch, so that outputs depend on other inputs.
    """
    return float(batch_norm_scale(layer).abs().max()) * ROUNDING


def batch_norm_scale(layer: nn.Module) -> Tensor:
    """The factor ``[channels]`` float64 of each channel; raises as `batch_norm_norm` does."""
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    if layer.training or layer.running_var is None:
        raise ValueError("it normalizes by the statistics of the batch; call model.eval()")
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    return scale if layer.weight is None else scale * layer.weight.detach().double()


def average_pool_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Of an average pool, adaptive or not: exact, as the product of one matrix for each axis.

    Raises:
        ValueError: the pool divides by something other than the size of its window.
    """
    if getattr(layer, "divisor_override", None):
        raise ValueError("it has a divisor_override; scale its output instead")
    norm = 1.0
    for axis, side in enumerate(shape[1:]):
        points = torch.eye(side, dtype=torch.float64).unsqueeze(1)
        if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
            kernel, stride, padding = (
                along(getattr(layer, name), axis) for name in ("kernel_size", "stride", "padding")
            )
            pooled = F.avg_pool1d(
                points, kernel, stride, padding, layer.ceil_mode, layer.count_include_pad
            )
        else:
            assert isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d)
            pooled = F.adaptive_avg_pool1d(points, along(layer.output_size, axis) or side)
        norm *= matrix_norm(pooled.squeeze(1))
    return norm


def max_pool_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The Lipschitz constant of a max-pool: the root of how many windows share an input."""
    shared = 1
    for axis in range(len(shape) - 1):
        kernel, stride, dilation = (
            along(getattr(layer, name), axis) for name in ("kernel_size", "stride", "dilation")
        )
        shared *= -(-kernel // (stride // math.gcd(stride, dilation)))
    return math.sqrt(shared)


def along(setting: Any, axis: int) -> Any:
    """A layer's setting for one axis: the setting itself, or what a tuple has there."""
    return setting[axis] if isinstance(setting, tuple) else setting

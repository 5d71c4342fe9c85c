"""Slopes of single features through 2-d convolutions, at the cost of what they can see.

A feature behind convolutions and max-pools depends on a window of each layer, outside of which
its slope is exactly zero. PyTorch's backward pass multiplies those zeros; inside `CheapSlopes`
convolutions of stride 1 crop them first. Results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WORTH = 0.8
"""Share of a layer above which a window is not worth cropping to."""

SHOWN = 4
"""Lanes that show whether windows are small; behind dense layers they never are."""

FEW = 4
"""Channels of a result up to which two by two of its pixels are computed as channels."""


class CheapSlopes(TorchFunctionMode):
    """Inside, slopes of 2-d convolutions in their inputs are windowed; in weights there are none.

    Batch norm in eval mode becomes the affine map that it is. For ``torch.func.vjp`` under
    ``vmap``, with weights as constants and not inside other transforms: it waits for values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and len(args) == 7 and not kwargs and _fits(*args):
            x, weight, bias, _, padding, dilation, _ = args
            return _Convolution.apply(x, weight, bias, _pair(padding), _pair(dilation))
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Whether the transposed convolution is a convolution: stride 1, one group, not over-padded."""
    if x.ndim != 4 or groups != 1 or _pair(stride) != (1, 1) or isinstance(padding, str):
        return False
    reach = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
    return all(p <= r for p, r in zip(_pair(padding), reach, strict=True))


def _pair(setting: Any) -> tuple[int, int]:
    """A setting for both axes: one number for both, or one for each or for both in a sequence."""
    rows, columns = (setting, setting) if isinstance(setting, int) else (setting[0], setting[-1])
    return rows, columns


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, given statistics being constants."""
    if training or mean is None or variance is None:
        return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * scale.view(shape) + shift.view(shape)


class _Convolution(Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        return F.conv2d(x, weight, bias, 1, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        found = _Transposed.apply(slope, weight, ctx.padding, ctx.dilation)
        return found, None, None, None, None


class _Transposed(Function):
    """Differentiated no further; its own class because ``vmap`` asks for a rule."""

    @staticmethod
    def forward(
        slope: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]
    ) -> Tensor:
        return transposed(slope, weight, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        slope: Tensor,
        weight: Tensor,
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> tuple[Tensor, int]:
        lanes = slope.movedim(in_dims[0] or 0, 0)
        found = transposed(lanes.flatten(0, 1), weight, padding, dilation)
        return found.view(*lanes.shape[:2], *found.shape[1:]), 0


def transposed(
    slope: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """The slope in a convolution's input from that in its output ``[n, C, H, W]``, stride 1."""
    flipped = weight.flip(2, 3).transpose(0, 1)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    height, width = slope.shape[2:]
    (top, tall), (left, wide) = windows(slope[:SHOWN])
    if tall * wide <= WORTH * height * width:
        (top, tall), (left, wide) = windows(slope)
    if tall * wide > WORTH * height * width:
        inverse = (reach[0] - padding[0], reach[1] - padding[1])
        return convolved(slope, flipped, inverse, dilation)
    starts = list(zip(top, left, strict=True))
    cropped = torch.stack(
        [one[:, t : t + tall, f : f + wide] for one, (t, f) in zip(slope, starts, strict=True)]
    )
    found = convolved(cropped, flipped, (reach[0], reach[1]), dilation)
    rows, columns = height + reach[0] - 2 * padding[0], width + reach[1] - 2 * padding[1]
    result = slope.new_zeros(len(slope), weight.shape[1], rows, columns)
    for into, one, (t, f) in zip(result, found, starts, strict=True):
        to_y, of_y = overlap(t - padding[0], found.shape[2], rows)
        to_x, of_x = overlap(f - padding[1], found.shape[3], columns)
        into[:, to_y, to_x] = one[:, of_y, of_x]
    return result


def convolved(
    x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """``F.conv2d`` of stride 1; where few channels come out, four pixels of each at a time.

    The kernels of CPUs compute channels by the width of their registers. A channel for each
    pixel of a square of two by two, at stride 2 with a kernel that is one wider, fills them.
    """
    rows, columns = (
        n + 2 * p - d * (k - 1)
        for n, p, d, k in zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=True)
    )
    if len(weight) > FEW or dilation != (1, 1) or rows % 2 or columns % 2:
        return F.conv2d(x, weight, None, 1, padding, dilation)
    shifts = [(left, 1 - left, top, 1 - top) for top in (0, 1) for left in (0, 1)]
    square = torch.stack([F.pad(weight, shift) for shift in shifts], 1).flatten(0, 1)
    return F.pixel_shuffle(F.conv2d(x, square, None, 2, padding), 2)


def windows(slope: Tensor) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """Of the rows and of the columns of ``slope [n, C, H, W]``: see `window`."""
    seen = (slope != 0).any(1)
    return window(seen.any(2)), window(seen.any(1))


def window(seen: Tensor) -> tuple[list[int], int]:
    """First positions of windows of one length that hold all that is ``seen [n, positions]``."""
    total = seen.shape[1]
    positions = torch.arange(total, device=seen.device)
    first = positions.expand_as(seen).where(seen, total).amin(1)
    last = positions.expand_as(seen).where(seen, -1).amax(1)
    length = max(1, int((last - first + 1).max()))
    return first.clamp_max(total - length).tolist(), length


def overlap(start: int, length: int, total: int) -> tuple[slice, slice]:
    """Where a stretch that begins at ``start`` lies in ``total``, and which part of it does."""
    low, high = max(0, start), min(total, start + length)
    return slice(low, high), slice(low - start, high - start)

"""The factors of a weight gradient: what the layer sees, and what comes back to it.

That of a dense layer's or a convolution's weight is ``sum_l back_l seen_l^T`` over the positions
``l`` that share the weight: one for a dense layer that sees a vector, the pixels of its output for
a convolution, whose ``seen_l`` is a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

LinearMap = Callable[[Tensor], Tensor]


def has_factors(module: nn.Module) -> bool:
    """Whether `patches` and `backs` know layers of this kind."""
    if type(module) is nn.Linear:
        return True
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def smooth(module: nn.Module, seen: Tensor, output: Tensor) -> Tensor:
    """The layer's ``output``, for a convolution by a way whose derivatives cost no more than it.

    PyTorch's own second derivative of a convolution computes that of its weight, asked or not.
    """
    if not isinstance(module, nn.Conv2d):
        return output

    def forth(x: Tensor) -> Tensor:
        return F.conv2d(
            x, module.weight, None, module.stride, module.padding, module.dilation, module.groups
        )

    def back(slope: Tensor) -> Tensor:
        found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            seen.shape,
            module.weight,
            slope,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )
        return found

    made: Tensor = _Linear.apply(seen, forth, back)
    return made if module.bias is None else made + module.bias[:, None, None]


class _Linear(Function):
    """A linear map with constant coefficients and its adjoint, each the other's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: LinearMap, back: LinearMap) -> Tensor:
        ctx.maps = forth, back
        return forth(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        forth, back = ctx.maps
        return _Linear.apply(slopes[0], back, forth), None, None


def patches(module: nn.Module, seen: Tensor) -> Tensor:
    """What each position of a factored layer sees: ``[n, groups, inputs of a unit, positions]``."""
    if not isinstance(module, nn.Conv2d):
        return positions(seen)
    rows, columns = (int(side) for side in module.padding)
    windows = F.pad(seen, (columns, columns, rows, rows))  # views and one copy: F.unfold is slower
    settings = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(settings, 2):
        windows = windows.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    pixels = windows.shape[2:4].numel()
    return windows.permute(0, 1, 4, 5, 2, 3).reshape(len(seen), module.groups, -1, pixels)


def backs(module: nn.Module, back: Tensor) -> Tensor:
    """What comes back to each position: ``[n, groups, units, positions]``."""
    if not isinstance(module, nn.Conv2d):
        return positions(back)
    return back.reshape(len(back), module.groups, -1, back.shape[2:].numel())


def positions(vectors: Tensor) -> Tensor:
    """``[n, ..., features]`` as one group: ``[n, 1, features, positions]``."""
    return vectors.reshape(len(vectors), 1, -1, vectors.shape[-1]).transpose(2, 3)

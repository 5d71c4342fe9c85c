"""Certified Lipschitz constants of a feature extractor: the network up to a dense layer.

`lipschitz_product` multiplies the constants of the layers; `lipschitz_merged` takes
consecutive linear layers together and is never larger. Both hold for **all** pairs of inputs,
in L2 norm, from pixels (in the task's range, before normalization) to features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fl_privacy.feature_chain import Piece, Scale, feature_chain
from fl_privacy.operator_norms import (
    average_pool_norm,
    batch_norm_norm,
    convolution_norm,
    matrix_norm,
    max_pool_norm,
)
from fl_privacy.types import Task

DENSE = 1024
"""A linear map is made a matrix where its smaller side has at most this many entries."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUSIBLE = (nn.Linear, *CONVOLUTIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Constant = Callable[[Any, tuple[int, ...]], float]
"""The certified constant of a layer for inputs of a shape."""


class LipschitzError(ValueError):
    """No Lipschitz constant can be certified; the message names the layer."""


def always(value: float) -> Constant:
    """The same constant for every layer of a kind."""
    return lambda layer, shape: value


LINEAR: Mapping[type[nn.Module], Constant] = {
    Scale: lambda layer, shape: 1 / min(layer.std),
    nn.Linear: lambda layer, shape: matrix_norm(layer.weight.detach()),
    **dict.fromkeys(CONVOLUTIONS, convolution_norm),
    **dict.fromkeys(BATCH_NORMS, lambda layer, shape: batch_norm_norm(layer)),
    nn.AvgPool1d: average_pool_norm,
    nn.AvgPool2d: average_pool_norm,
    nn.AdaptiveAvgPool1d: average_pool_norm,
    nn.AdaptiveAvgPool2d: average_pool_norm,
    nn.Flatten: always(1.0),
    nn.Identity: always(1.0),
    nn.Dropout: lambda layer, shape: 1 / (1 - layer.p) if layer.training else 1.0,
}
"""Affine layers. Dropout in train mode: for any one mask, as it scales what it keeps."""

ACTIVATIONS: Mapping[type[nn.Module], Constant] = {
    nn.ReLU: always(1.0),
    nn.ReLU6: always(1.0),
    nn.Hardtanh: always(1.0),
    nn.Tanh: always(1.0),
    nn.Softplus: always(1.0),
    nn.Sigmoid: always(0.25),
    nn.SiLU: always(1.0999),
    nn.GELU: always(1.13),
    nn.LeakyReLU: lambda layer, shape: max(1.0, abs(layer.negative_slope)),
    nn.ELU: lambda layer, shape: max(1.0, abs(layer.alpha)),
}
"""Elementwise functions: their largest slope (of SiLU 1.09984, of GELU 1.12904, rounded up)."""

CONSTANTS: Mapping[type[nn.Module], Constant] = {
    **LINEAR,
    **ACTIVATIONS,
    nn.MaxPool1d: max_pool_norm,
    nn.MaxPool2d: max_pool_norm,
    nn.MaxPool3d: max_pool_norm,
}


def lipschitz_product(model: nn.Module, layer: str, task: Task) -> float:
    """Product of the layers' constants: change of ``layer``'s input by change of pixels, L2.

    Holds for every pair of inputs and for ``model`` in the mode it is in. The kind of bound of
    Szegedy et al., Intriguing Properties of Neural Networks, 2014, section 4.3,
    https://arxiv.org/abs/1312.6199, with certified norms.

    Raises:
        ChainError: ``layer`` is not dense, or the network before it is no chain of layers.
        LipschitzError: a layer of a kind that is not known, or batch norm in train mode.
    """
    return math.prod(map(constant, feature_chain(model, layer, task)))


def lipschitz_merged(model: nn.Module, layer: str, task: Task, *, dense: int = DENSE) -> float:
    """Product over runs of consecutive linear layers; never above `lipschitz_product`.

    A run's constant is the product of its layers' with normalization and batch norms merged
    into the layer beside them or, where a side of the run has at most ``dense`` entries, the
    exact norm of its matrix.

    Raises:
        ChainError, LipschitzError: as `lipschitz_product`.
    """
    return math.prod(run_constant(run, dense) for run in runs(feature_chain(model, layer, task)))


def constant(piece: Piece) -> float:
    """The certified L2 Lipschitz constant of a layer.

    Raises:
        LipschitzError: none is known.
    """
    kind = type(piece.module)
    if kind not in CONSTANTS:
        known = ", ".join(sorted(known.__name__ for known in CONSTANTS if known is not Scale))
        raise LipschitzError(f"no Lipschitz constant is known for {piece}; known are {known}")
    try:
        return CONSTANTS[kind](piece.module, piece.shape)
    except ValueError as error:
        raise LipschitzError(f"no Lipschitz constant is known for {piece}: {error}") from None


def runs(chain: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Runs of consecutive linear layers, and every other layer by itself."""
    for linear, found in groupby(chain, key=is_affine):
        run = list(found)
        yield from ([run] if linear else ([piece] for piece in run))


def is_affine(piece: Piece) -> bool:
    """Whether the layer is one fixed affine map: not if it drops what it likes."""
    dropping = isinstance(piece.module, nn.Dropout) and piece.module.training
    return type(piece.module) in LINEAR and not dropping


def run_constant(run: Sequence[Piece], dense: int) -> float:
    """The smallest constant known for one of `runs`; merging never makes it larger."""
    whole = math.prod(map(constant, merged(run)))
    if not is_affine(run[0]) or is_exact(run):
        return whole
    small = min(math.prod(run[0].shape), math.prod(output_shape(run))) <= dense
    return min(whole, matrix_norm(matrix_of(run))) if small else whole


def is_exact(run: Sequence[Piece]) -> bool:
    """Whether a run is one dense layer at most, beside factors that are equal everywhere."""
    scalar = (nn.Flatten, nn.Identity, nn.Dropout)
    modules = [piece.module for piece in run if not isinstance(piece.module, scalar)]
    unequal = [m for m in modules if not (isinstance(m, Scale) and len(set(m.std)) == 1)]
    return len(unequal) < 2 and all(isinstance(module, nn.Linear) for module in unequal)


def merged(run: Sequence[Piece]) -> list[Piece]:
    """The same linear map, scales and batch norms merged into the layer beside them; float64."""
    done: list[Piece] = []
    for piece in run:
        module = deepcopy(piece.module).double()
        before = done[-1].module if done else None
        if isinstance(before, Scale) and isinstance(module, CONVOLUTIONS):
            done[-1] = Piece(piece.name, scaled(module, before), piece.shape)
        elif isinstance(before, FUSIBLE) and isinstance(module, _BatchNorm) and not module.training:
            fuse: Any = fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval
            done[-1] = replace(done[-1], module=fuse(before.eval(), module))
        else:
            done.append(Piece(piece.name, module, piece.shape))
    return done


def scaled(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, scale: Scale) -> nn.Module:
    """``layer`` as it acts on inputs before ``scale``."""
    weight = layer.weight.detach()
    std = torch.tensor(scale.std, dtype=weight.dtype, device=weight.device)
    own = std.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)
    layer.weight = nn.Parameter(weight / own.view(*own.shape, *(1,) * (weight.ndim - 2)))
    return layer


def matrix_of(run: Sequence[Piece]) -> Tensor:
    """The matrix ``[inputs, outputs]`` float64 of a run of linear layers, without its offset."""
    modules = nn.Sequential(*(deepcopy(piece.module).double() for piece in run)).eval()
    device = next((p.device for p in modules.parameters()), torch.device("cpu"))
    size = math.prod(run[0].shape)
    basis = torch.eye(size, dtype=torch.float64, device=device).view(-1, *run[0].shape)
    with torch.no_grad():
        offset = modules(torch.zeros_like(basis[:1]))
        parts = [modules(basis[i : i + 256]) - offset for i in range(0, size, 256)]
    return torch.cat(parts).flatten(1)


def output_shape(run: Sequence[Piece]) -> tuple[int, ...]:
    """Shape of one output of a run of layers."""
    modules = nn.Sequential(*(deepcopy(piece.module).to("meta").double() for piece in run)).eval()
    inputs = torch.empty(1, *run[0].shape, device="meta", dtype=torch.float64)
    return tuple(modules(inputs).shape[1:])

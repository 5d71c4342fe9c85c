"""Lipschitz constants of a feature extractor near one image, and the distance they certify.

Far from an image the slopes of a network can be anything; near it they cannot have changed
much. With a certified constant L(s) on the ball of radius s around X for some radii, whoever
goes from X to X' in a straight line changes f by at most the integral of L over the distance:
an X' with ``||f(X') - f(X)|| = gap`` is at least as far as it takes the integral to reach the
gap. That is more than the gap over a global constant, whatever X' is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_privacy.feature_chain import Piece, feature_chain
from fl_privacy.lipschitz import (
    LINEAR,
    LipschitzError,
    lipschitz_merged,
    matrix_of,
    runs,
)
from fl_privacy.operator_norms import ROUNDING, matrix_norm
from fl_privacy.types import Task

RADII = tuple(0.003 * 1.6**i for i in range(12))
"""Radii of the balls, over the range of the pixels: 0.003 to 0.5."""

UNMOVED = (nn.Flatten, nn.Identity, nn.Dropout)
"""Layers that change no value in eval mode."""

Slopes = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The least and the largest slope of an elementwise function between two bounds."""


def _rising(layer: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of ReLU and LeakyReLU: two values, which jump at 0."""
    left = float(getattr(layer, "negative_slope", 0.0))
    at_low = torch.where(low >= 0, 1.0, left)
    at_high = torch.where(high > 0, 1.0, left)
    return torch.minimum(at_low, at_high), torch.maximum(at_low, at_high)


def _bell(slope: Callable[[Tensor], Tensor]) -> Slopes:
    """Slopes that fall on both sides of 0, such as those of sigmoid and tanh."""

    def between(layer: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        far = torch.maximum(low.abs(), high.abs())
        near = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs()))
        return slope(far), slope(near)

    return between


SLOPES: Mapping[type[nn.Module], Slopes] = {
    nn.ReLU: _rising,
    nn.LeakyReLU: _rising,
    nn.Sigmoid: _bell(lambda z: z.sigmoid() * (-z).sigmoid()),
    nn.Tanh: _bell(lambda z: 1 - z.tanh().square()),
}


@dataclass(frozen=True)
class Stage:
    """A linear map and the activation behind it, at one image.

    ``matrix [outputs, inputs]``; ``values [outputs]`` before the activation; ``jacobian
    [outputs, pixels]`` of them; None for an activation that is not there.
    """

    matrix: Tensor
    values: Tensor
    jacobian: Tensor
    activation: nn.Module | None


@dataclass(frozen=True)
class Neighborhood:
    """Certified constants: ``constants[i]`` within ``radii[i]`` (pixels), and ``everywhere``."""

    radii: tuple[float, ...]
    constants: tuple[float, ...]
    everywhere: float


def neighborhood(
    model: nn.Module,
    layer: str,
    task: Task,
    image: Tensor,
    *,
    radii: tuple[float, ...] = RADII,
) -> Neighborhood:
    """The constants of the features of ``layer`` near ``image [*input_shape]`` (pixels).

    In eval mode and float64, for linear layers with `SLOPES` activations between them, small
    enough for their matrices and Jacobians to be held (an entry for each output and pixel).
    ``radii`` rise, in units of the range of pixels; those after the first that says no more
    than `lipschitz_merged` are left out.

    Raises:
        ChainError, LipschitzError: the network is of another kind; the message names the layer.
    """
    stages = stages_at(feature_chain(model, layer, task), task, image)
    everywhere = lipschitz_merged(model, layer, task)
    kept: list[tuple[float, float]] = []
    for radius in radii:
        within = local_lipschitz(stages, radius * (task.high - task.low))
        if within >= everywhere:
            break
        kept.append((radius * (task.high - task.low), within))
    return Neighborhood(tuple(r for r, _ in kept), tuple(c for _, c in kept), everywhere)


def certified_distance(near: Neighborhood, gap: float) -> float:
    """No X' with ``||f(X') - f(X)|| >= gap`` is closer to the image than this; L2, pixels.

    **Binds every** X', however found, as `certificates.certified_bound` does, which is never
    above. The integral of L is taken as its upper sum over the balls.
    """
    distance = changed = 0.0
    for radius, constant in zip(near.radii, near.constants, strict=True):
        step = (radius - distance) * constant
        if changed + step > gap:
            return distance + (gap - changed) / constant
        distance, changed = radius, changed + step
    return distance + (gap - changed) / near.everywhere


def local_lipschitz(stages: Sequence[Stage], radius: float) -> float:
    """A certified Lipschitz constant of f on the ball of ``radius`` (L2, pixels) around the image.

    The norm of the Jacobian at radius 0. Layer by layer, by how much the Jacobian differs from
    the image's at most, in norm: with slopes D, linear map W and the Jacobian J before it,
    ``D' W J' - D W J = D' W (J' - J) + (D' - D) W J``, where the values before D move by the
    radius times the norms of the rows of W J' at most.
    """
    change = 0.0
    at_image = stages[-1].jacobian
    for stage in stages:
        rows = stage.jacobian.norm(dim=1) + stage.matrix.norm(dim=1) * change
        low, high = slopes(stage, stage.values - radius * rows, stage.values + radius * rows)
        here, _ = slopes(stage, stage.values, stage.values)
        largest, off = torch.maximum(low.abs(), high.abs()), torch.maximum(high - here, here - low)
        through = scaled_norm(largest, stage.matrix) * change if change else 0.0
        change = through + scaled_norm(off, stage.jacobian)
        at_image = here[:, None] * stage.jacobian
    return (matrix_norm(at_image) + change) * ROUNDING


def slopes(stage: Stage, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the slopes of a stage's activation for values between ``low`` and ``high``."""
    if stage.activation is None:
        return torch.ones_like(low), torch.ones_like(low)
    return SLOPES[type(stage.activation)](stage.activation, low, high)


def scaled_norm(factors: Tensor, matrix: Tensor) -> float:
    """The norm of ``matrix`` with its rows times ``factors``; rows of factor 0 are left out."""
    kept = factors > 0
    return matrix_norm(factors[kept, None] * matrix[kept]) if bool(kept.any()) else 0.0


def stages_at(chain: list[Piece], task: Task, image: Tensor) -> list[Stage]:
    """The network as linear maps and activations, each with its Jacobian at ``image``."""
    found: list[Stage] = []
    values = image.detach().double().unsqueeze(0)
    mean = torch.tensor(task.mean, dtype=values.dtype, device=values.device)
    values = values - mean.view(-1, *(1,) * (values.ndim - 2))
    jacobian = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
    for run in runs(chain):
        kind, moved = type(run[0].module), [p for p in run if type(p.module) not in UNMOVED]
        modules = nn.Sequential(*(deepcopy(p.module).double() for p in run)).eval()
        with torch.no_grad():
            values = modules(values)
        if not moved:
            continue
        if kind in LINEAR:
            matrix = matrix_of(run).T
            jacobian = matrix @ jacobian
            found.append(Stage(matrix, values.flatten(), jacobian, None))
        elif kind in SLOPES and found and found[-1].activation is None:
            last = found[-1]
            found[-1] = Stage(last.matrix, last.values, last.jacobian, run[0].module)
            slope, _ = slopes(found[-1], last.values, last.values)
            jacobian = slope[:, None] * last.jacobian
        else:
            known = ", ".join(sorted(one.__name__ for one in (*LINEAR, *SLOPES)))
            raise LipschitzError(f"no local constant is known for {run[0]}; known are {known}")
    return found

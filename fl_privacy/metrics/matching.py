"""Match reconstructed images to true ones, one to one, before any score.

A gradient is a sum over its batch, so the order of the images in it cannot be
known: a score must not depend on it. There is one assignment, the one of least
total squared error, and MSE, PSNR, SSIM and the report's pictures all use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fl_privacy.types import Reconstruction, Result, Samples, Task

Made = TypeVar("Made", Reconstruction, Samples)


def in_unit_range(made: Made, task: Task) -> Made:
    """Inputs in the task's range ``low .. high`` mapped to [0, 1], where they are scored."""
    inputs = made.inputs.detach().to("cpu", torch.float64)
    return replace(made, inputs=(inputs - task.low) / (task.high - task.low))


def pixels(inputs: Tensor) -> Tensor:
    """Inputs of `in_unit_range` as they are scored: on the CPU, float64, clamped to [0, 1].

    A pixel that is not a number counts as 0 (black).
    """
    return inputs.detach().to("cpu", torch.float64).nan_to_num(nan=0.0).clamp(0.0, 1.0)


def assign(inputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one assignment of least total squared error.

    Args:
        inputs: reconstructed pixels ``[n, *shape]``.
        truth: true pixels ``[m, *shape]``.

    Returns:
        Indices into ``inputs`` and into ``truth``, ``[k]`` each, sorted by the latter.
        ``k = min(n, m)``; of more than ``m`` reconstructions only the first ``m`` count,
        since picking the best of many guesses would select by the truth.

    Raises:
        ValueError: the images have different shapes.
    """
    if inputs.shape[1:] != truth.shape[1:]:
        raise ValueError(
            f"a reconstruction must have the shape of the truth: expected images of "
            f"{tuple(truth.shape[1:])}, got {tuple(inputs.shape[1:])}; "
            f"check that results and truth come from the same run"
        )
    mine, true = pixels(inputs[: len(truth)]).flatten(1), pixels(truth).flatten(1)
    rows, columns = linear_sum_assignment(torch.cdist(mine, true).square().numpy())
    order = torch.from_numpy(columns).argsort()
    return torch.from_numpy(rows)[order], torch.from_numpy(columns)[order]


def reconstruction(result: Result, metric: str) -> Reconstruction:
    """Narrow a result to what an image metric can score.

    Raises:
        TypeError: it holds property scores.
    """
    if not isinstance(result, Reconstruction):
        raise TypeError(
            f"{metric} scores reconstructions, got {type(result).__name__}; "
            f"choose a metric of property scores"
        )
    return result


def matched(result: Reconstruction, truth: Samples) -> tuple[Tensor, Tensor]:
    """Clamped pixel pairs ``[k, *shape]``: reconstructed, true."""
    rows, columns = assign(result.inputs, truth.inputs)
    return pixels(result.inputs.detach().cpu()[rows]), pixels(truth.inputs.cpu()[columns])


def matched_pairs(
    results: Sequence[Result], truths: Sequence[Samples], metric: str
) -> list[tuple[Tensor, Tensor]]:
    """`matched` for each result.

    Raises:
        ValueError: not one truth for each result.
    """
    if len(results) != len(truths):
        raise ValueError(
            f"{metric} needs one truth for each of the {len(results)} results, got {len(truths)}"
        )
    return [
        matched(reconstruction(result, metric), truth)
        for result, truth in zip(results, truths, strict=True)
    ]

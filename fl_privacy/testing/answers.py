"""What results of an adversary have to look like, and when two of them are the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fl_privacy.testing.expecting import expect, same_tensors
from fl_privacy.types import (
    Failure,
    Observation,
    PropertyScores,
    Reconstruction,
    Representations,
    Result,
    Task,
)


def check_results(results: Sequence[Result | Failure], observations: Sequence[Observation]) -> None:
    """Check keys and order, shapes, and the range of pixels."""
    expect(
        len(results) == len(observations),
        f"expected one result for each of {len(observations)} observations, got {len(results)}",
    )
    for result, observation in zip(results, observations, strict=True):
        expect(
            result.key == observation.key,
            f"expected the result of {observation.key}, got {result.key}: keep the order",
        )
        if isinstance(result, Failure):
            expect(bool(result.reason), "a Failure needs a reason that says what would help")
        elif isinstance(result, PropertyScores):
            for scores in (result.scores, *result.by_layer.values()):
                expect(
                    scores.shape == (len(observation.exchanges),),
                    f"expected one score for each of {len(observation.exchanges)} exchanges, "
                    f"got {tuple(scores.shape)}",
                )
        elif isinstance(result, Representations):
            _check_representations(result, observation.task)
        else:
            _check_reconstruction(result, observation.task)


def _check_reconstruction(result: Reconstruction, task: Task) -> None:
    expect(
        tuple(result.inputs.shape[1:]) == task.input_shape,
        f"inputs must be [n, {', '.join(map(str, task.input_shape))}], "
        f"got {tuple(result.inputs.shape)}",
    )
    expect(
        result.labels.shape == result.inputs.shape[:1],
        f"expected {len(result.inputs)} labels, got {tuple(result.labels.shape)}",
    )
    low, high = float(result.inputs.min()), float(result.inputs.max())
    expect(
        task.low - 1e-4 <= low and high <= task.high + 1e-4,
        f"inputs must be pixels in [{task.low}, {task.high}], got [{low:.3f}, {high:.3f}]; "
        f"use Task.denormalize and clamp",
    )


def _check_representations(result: Representations, task: Task) -> None:
    classes = result.classes
    expect(
        classes.ndim == 1 and bool(torch.isin(classes, torch.arange(task.classes)).all()),
        f"classes must be [c] of 0..{task.classes - 1}, got {classes}",
    )
    expect(bool((classes.diff() > 0).all()), f"classes must ascend, each one once, got {classes}")
    for name, rows in result.layers.items():
        expect(
            rows.ndim == 2 and len(rows) == len(classes) and bool(rows.isfinite().all()),
            f"{name}: expected finite rows [{len(classes)}, features], got {tuple(rows.shape)}",
        )


def same_results(a: Sequence[Result | Failure], b: Sequence[Result | Failure]) -> bool:
    """Whether results are equal in what was found, to the last bit; seconds may differ."""
    return len(a) == len(b) and all(_same_result(x, y) for x, y in zip(a, b, strict=True))


def _same_result(a: Result | Failure, b: Result | Failure) -> bool:
    if isinstance(a, Reconstruction) and isinstance(b, Reconstruction):
        return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)
    if isinstance(a, PropertyScores) and isinstance(b, PropertyScores):
        return same_tensors({"": a.scores, **a.by_layer}, {"": b.scores, **b.by_layer})
    if isinstance(a, Representations) and isinstance(b, Representations):
        return torch.equal(a.classes, b.classes) and same_tensors(a.layers, b.layers)
    return a == b

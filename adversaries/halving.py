"""When the memory does not suffice: the same targets in batches of half the width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from adversaries.matching import Chunk
from fl_privacy.types import Failure, Reconstruction

Solve = Callable[[Chunk, int], list[Reconstruction]]
"""All targets of a chunk in one batch that has room for so many targets."""

TOO_LARGE = (
    "one target does not fit into memory: try fewer restarts, float32 or a device with more memory"
)


def within_memory(
    solve: Solve, chunk: Chunk, width: int, *, planned: int
) -> tuple[list[Reconstruction | Failure], int]:
    """The result of each target, and the width that the memory sufficed for.

    A result that was found at less than the ``planned`` width says so. Targets that do not
    even fit alone fail, and only those.
    """
    results: list[Reconstruction | Failure] = []
    while len(results) < len(chunk.targets):
        part = replace(chunk, targets=chunk.targets[len(results) : len(results) + width])
        found = tried(solve, part, width)
        if found is not None:
            results += [noted(result, width, planned) for result in found]
        elif width > 1:
            width //= 2
        else:
            results += [Failure(target.key, TOO_LARGE) for target in part.targets]
    return results, width


def tried(solve: Solve, chunk: Chunk, width: int) -> list[Reconstruction] | None:
    """The results, or None when the memory ran out; by then all of it is free again."""
    try:
        return solve(chunk, width)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def noted(result: Reconstruction, width: int, planned: int) -> Reconstruction:
    """The result, with the width in its message if that is not the planned one."""
    if width == planned or result.outcome.message:
        return result
    message = f"in batches of {width}, as the memory did not suffice for {planned} targets"
    return replace(result, outcome=replace(result.outcome, message=message))


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )

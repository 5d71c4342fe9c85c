"""L-BFGS over everything a lane does not know: the optimizer of DLG and iDLG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.func import grad_and_value, vmap

from adversaries import lbfgs
from adversaries.gradient_matching import Advance, Problem, Seen
from adversaries.replay import replayable

Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Flat unknowns of a lane and its known labels -> normalized inputs and labels."""


class Settings(Protocol):
    """What an attack that searches by this optimizer has to say, as its own fields."""

    @property
    def iterations(self) -> int: ...

    @property
    def inner(self) -> int: ...

    @property
    def memory(self) -> int: ...


def minimize(
    problem: Problem, start: Tensor, read: Read, settings: Settings, advance: Advance
) -> tuple[Tensor, Tensor]:
    """Move ``start [lanes, unknowns]`` downhill; the lanes' last points and objectives.

    Each lane has its own line search and history, so one that diverges stops alone.
    """

    def objective(unknown: Tensor, known: Tensor, seen: Seen) -> Tensor:
        return problem.objective(*read(unknown, known), seen)

    def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
        gradient, values = vmap(grad_and_value(objective))(
            points, problem.batch.labels, problem.seen
        )
        return gradient, values

    def outer(done: int, values: Tensor) -> None:
        if done % settings.inner == 0:
            advance(done // settings.inner, values)

    evaluations = settings.iterations * settings.inner + 1
    return lbfgs.minimize(
        replayable(evaluate, start, calls=evaluations),
        start,
        evaluations=evaluations,
        memory=settings.memory,
        advance=outer,
    )

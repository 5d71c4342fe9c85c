"""Adam on the sign of the gradient, in a box, with a falling step: the optimizer of GS."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from adversaries.gradient_matching import Advance, Found, Problem
from adversaries.matching import box
from adversaries.replay import replayable

FIRST, SECOND = 0.9, 0.999


class Settings(Protocol):
    """What an attack that moves its inputs by this optimizer has to say, as its own fields."""

    @property
    def iterations(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def signed(self) -> bool: ...

    @property
    def boxed(self) -> bool: ...


def minimize(
    problem: Problem,
    inputs: Tensor,
    settings: Settings,
    advance: Advance,
    *,
    compiled: bool = False,
) -> Found:
    """Move the inputs of each lane downhill; labels stay as inferred or granted.

    Elementwise, so lanes stay independent. The step size is divided by ten after 3/8,
    5/8 and 7/8 of the iterations (Geiping et al., 2020, appendix A). Nothing waits for
    the device.
    """
    labels = problem.batch.labels

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        gradient, losses = vmap(grad_and_value(problem.objective))(x, labels, problem.seen)
        return gradient, losses

    iterations, lr = settings.iterations, settings.lr
    step = replayable(slopes, inputs, calls=iterations, compiled=compiled)
    low, high = box(problem.batch.task, inputs)
    milestones = {iterations * eighths // 8 for eighths in (3, 5, 7)}
    first, second = torch.zeros_like(inputs), torch.zeros_like(inputs)
    for i in range(1, iterations + 1):
        gradient, losses = step(inputs)
        direction = gradient.sign() if settings.signed else gradient
        first.lerp_(direction, 1 - FIRST)
        second.mul_(SECOND).addcmul_(direction, direction, value=1 - SECOND)
        scale = (second / (1 - SECOND**i)).sqrt_().add_(1e-8)
        inputs = inputs.addcdiv(first, scale, value=-lr / (1 - FIRST**i))
        if settings.boxed:
            inputs.clamp_(low, high)
        if i in milestones:
            lr /= 10
        advance(i, losses)
    return Found(inputs, labels, vmap(problem.objective)(inputs, labels, problem.seen))

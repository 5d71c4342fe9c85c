"""Gradient similarity (GS): Geiping et al., "Inverting Gradients", NeurIPS 2020."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad_and_value, vmap

from adversaries.matching import (
    Batch,
    Chunk,
    Target,
    attack_chunks,
    box,
    initial_inputs,
    make_batch,
    plan_width,
)
from adversaries.objectives import cosine_distance, total_variation
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import (
    Failure,
    NonNegativeFloat,
    Observation,
    Outcome,
    PositiveFloat,
    PositiveInt,
    Reconstruction,
    Tensors,
)


class GradientSimilarity(Component):
    """Match the direction of the gradient, with total variation as image prior.

    Minimizes ``1 - cosine(g(x), g*) + tv * TV(x)`` (eq. 4) by Adam on the sign of the
    gradient, in a box, with the step divided by ten after 3/8, 5/8 and 7/8 of the
    iterations (appendix A). Of several restarts the one with the smallest final
    objective is kept; the truth is never consulted. The objective's gradient is taken
    with respect to the inputs only, for all targets and restarts in one batch.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"local_training"})

    iterations: Annotated[PositiveInt, Field(description="optimizer steps")] = 600
    restarts: Annotated[PositiveInt, Field(description="starting points for each target")] = 1
    lr: Annotated[PositiveFloat, Field(description="first step size, normalized units")] = 0.1
    tv: Annotated[NonNegativeFloat, Field(description="weight of the total variation")] = 2e-3
    signed: Annotated[bool, Field(description="feed Adam the sign of the gradient")] = True
    boxed: Annotated[bool, Field(description="clamp to the pixel range after each step")] = True
    width: Annotated[
        PositiveInt | None, Field(description="targets in one batch; none: chosen by memory")
    ] = None

    def plan_width(self, observations: Sequence[Observation], *, device: torch.device) -> int:
        """The width to use for these targets when none is set."""
        return plan_width(observations, restarts=self.restarts, device=device)

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Reconstruction | Failure]:
        """Reconstruct the inputs of each target; progress counts target-iterations."""
        if not observations:
            return
        width = self.width or self.plan_width(observations, device=device)
        total = self.iterations * len(observations)

        def solve(chunk: Chunk) -> list[Reconstruction]:
            start = time.perf_counter()
            before, together = self.iterations * chunk.done, len(chunk.targets)

            def advance(iteration: int, losses: Tensor) -> None:
                progress(before + iteration * together, total, loss=losses.mean())

            lanes = {"width": width, "restarts": self.restarts}
            batch = make_batch(chunk, **lanes, device=device)
            inputs = initial_inputs(chunk, **lanes, seed=seed).to(device)
            inputs, losses = self.optimize(batch, inputs, advance)
            results = self.select(batch, chunk.targets, inputs, losses)
            share = (time.perf_counter() - start) / together
            return [replace(result, seconds=share) for result in results]

        yield from attack_chunks(observations, width, solve)

    def objective(self, batch: Batch, inputs: Tensor, labels: Tensor, observed: Tensors) -> Tensor:
        """Eq. 4 for one lane; ``inputs [images, *input_shape]`` normalized, ``labels [images]``."""
        simulated = batch.simulate(inputs, labels)
        prior = total_variation(inputs, len(batch.task.input_shape) - 1)
        return cosine_distance(simulated, observed) + self.tv * prior

    def optimize(
        self, batch: Batch, inputs: Tensor, advance: Callable[[int, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Run all lanes; returns final inputs and objectives ``[lanes]``. Never syncs."""

        def objective(x: Tensor, labels: Tensor, observed: Tensors) -> Tensor:
            return self.objective(batch, x, labels, observed)

        step = vmap(grad_and_value(objective))
        milestones = {self.iterations * eighths // 8 for eighths in (3, 5, 7)}
        first, second = torch.zeros_like(inputs), torch.zeros_like(inputs)
        low, high = box(batch.task, inputs)
        lr = self.lr
        for i in range(1, self.iterations + 1):
            gradient, losses = step(inputs, batch.labels, batch.gradients)
            direction = gradient.sign() if self.signed else gradient
            first.lerp_(direction, 1 - 0.9)
            second.mul_(0.999).addcmul_(direction, direction, value=1 - 0.999)
            scale = (second / (1 - 0.999**i)).sqrt_().add_(1e-8)
            inputs = inputs.addcdiv(first, scale, value=-lr / (1 - 0.9**i))
            if self.boxed:
                inputs.clamp_(low, high)
            if i in milestones:
                lr /= 10
            advance(i, losses)
        return inputs, vmap(objective)(inputs, batch.labels, batch.gradients)

    def select(
        self, batch: Batch, targets: Sequence[Target], inputs: Tensor, losses: Tensor
    ) -> list[Reconstruction]:
        """Keep each target's restart with the smallest objective; back to pixels, on the CPU."""
        losses = losses.view(-1, self.restarts)
        best_loss, best = losses.nan_to_num(nan=torch.inf).min(1)
        lanes = torch.arange(len(best), device=best.device) * self.restarts + best
        found = inputs[lanes].nan_to_num(nan=0.0).clamp(*box(batch.task, inputs))
        pixels = batch.task.denormalize(found).cpu()
        labels = batch.labels[lanes].cpu()
        return [
            Reconstruction(
                key=target.key,
                inputs=pixels[i],
                labels=labels[i],
                outcome=outcome(loss),
                loss=loss,
            )
            for i, (target, loss) in enumerate(
                zip(targets, best_loss.tolist(), strict=False)  # the rest is padding
            )
        ]


def outcome(loss: float) -> Outcome:
    """Whether the optimization ended with a number."""
    if loss == float("inf"):
        return Outcome("diverged", "the objective is not finite: try a smaller lr or tv")
    return Outcome("completed")

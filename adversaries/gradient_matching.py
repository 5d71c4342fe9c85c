"""What all attacks share that search for inputs whose gradient is the observed one."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.batch_statistics import deviation, observed_statistics
from adversaries.defended import check_defended, check_one_step, defenses_of
from adversaries.differentiability import check_differentiable, twice_differentiable_kernels
from adversaries.halving import within_memory
from adversaries.matching import (
    Batch,
    Chunk,
    attack_chunks,
    box,
    images_of,
    lane_draws,
    make_batch,
    targets_together,
)
from adversaries.objectives import total_variation
from adversaries.parts import select
from adversaries.planning import lane_count, plan_width
from adversaries.targets import Target, prepare
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import (
    Failure,
    NonNegativeFloat,
    Observation,
    Outcome,
    PositiveInt,
    Reconstruction,
    Tensors,
)

Advance = Callable[[int, Tensor], None]
"""Called with the number of iterations done and the lanes' objectives ``[lanes]``."""


Seen = tuple[tuple[Tensors, ...], Tensors]
"""What was observed of a lane: gradients of its linked rounds, and batch-norm statistics."""


@dataclass(frozen=True)
class Problem:
    """One batch and what the attack minimizes on it.

    ``objective(inputs, labels, seen)`` is for one lane, to be mapped over ``seen``;
    ``draw(shape, stream)`` gives normal numbers, each lane its own.
    """

    batch: Batch
    seen: Seen
    objective: Callable[[Tensor, Tensor, Seen], Tensor]
    draw: Callable[[tuple[int, ...], str], Tensor]


@dataclass(frozen=True)
class Found:
    """Where an optimizer ended: normalized inputs, labels ``[lanes, images]``, objectives."""

    inputs: Tensor
    labels: Tensor
    losses: Tensor


class GradientMatching(Component):
    """Base of the attacks that match gradients: preparation, batches, restarts, priors.

    A subclass brings a `distance` between gradients and an `optimize`. Of several
    restarts the one with the smallest final objective is kept; the truth is never
    consulted. Updates of several local steps are matched by unrolling those steps.
    """

    iterations: Annotated[PositiveInt, Field(description="optimizer steps")] = 600
    restarts: Annotated[PositiveInt, Field(description="starting points for each target")] = 1
    tv: Annotated[NonNegativeFloat, Field(description="weight of the total variation")] = 0.0
    batch_norm: Annotated[
        NonNegativeFloat, Field(description="weight of the batch-norm statistics prior")
    ] = 0.0
    layers: Annotated[
        str,
        Field(description="all, convolutions, dense, names joined by commas, -name for without"),
    ] = "all"
    nonzero: Annotated[
        bool, Field(description="match only entries that are not zero, for sparse updates")
    ] = False
    unread: Annotated[
        str, Field(description="parameters, as in layers, that labels are not inferred from")
    ] = ""
    defended: Annotated[
        bool, Field(description="simulate the defense too, which the threat model has to tell")
    ] = False
    local_steps: Annotated[
        Literal["unroll", "ignore"],
        Field(description="several local steps: unroll them, or take the update for a gradient"),
    ] = "unroll"
    dtype: Annotated[Literal["float32", "float64"], Field(description="precision")] = "float32"
    width: Annotated[
        PositiveInt | None, Field(description="images in one batch; none: chosen by memory")
    ] = None

    @property
    def requires(self) -> frozenset[str]:
        """The local training, and the defense if that is simulated."""
        return frozenset({"local_training", "defense"} if self.defended else {"local_training"})

    @abstractmethod
    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """How far a simulated gradient is from the observed one, for one lane; scalar."""

    @abstractmethod
    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """Run all lanes from ``inputs [lanes, images, *input_shape]`` without device waits."""

    def simulate(self, batch: Batch, inputs: Tensor, labels: Tensor) -> tuple[Tensors, ...]:
        """What would be observed of each linked round if a lane held these ``inputs``."""
        return batch.client.simulate(inputs, labels)

    def trust(self, inputs: Tensor, rounds: int) -> float:
        """Weight of the mean distance over so many linked ``rounds`` against the priors."""
        return 1.0

    def scale(self, observed: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
        """A chance to prepare the observed gradients, ``[lanes, ...]`` each."""
        return observed

    def plan_width(self, observations: Sequence[Observation], *, device: torch.device) -> int:
        """The width to use for these targets when none is set."""
        size = getattr(torch, self.dtype).itemsize
        return plan_width(observations, restarts=self.restarts, device=device, itemsize=size)

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
        room = planned = self.width or self.plan_width(observations, device=device)
        total = self.iterations * len(observations)
        passed: set[object] = set()

        def solve(chunk: Chunk) -> list[Reconstruction | Failure]:
            nonlocal room
            network = (chunk.observation.model, chunk.observation.local_training)
            if network not in passed:
                check_differentiable(chunk.model, chunk.observation.task)
                passed.add(network)
            before, together = self.iterations * chunk.done, len(chunk.targets)

            def advance(iteration: int, losses: Tensor) -> None:
                progress(before + iteration * together, total, loss=losses.mean())

            width = targets_together(chunk.observation, room)
            with twice_differentiable_kernels():
                results, fits = within_memory(
                    partial(self.solve, seed=seed, device=device, advance=advance),
                    chunk,
                    width,
                    planned=targets_together(chunk.observation, planned),
                )
            room = room if fits == width else fits * images_of(chunk.observation)
            return results

        yield from attack_chunks(observations, room, solve, self.prepare)

    def prepare(self, observation: Observation, model: torch.nn.Module) -> Target:
        """The chosen part of what was seen."""
        every = [name for name, _ in model.named_parameters()]
        unread = select(model, self.unread, every) if self.unread else ()
        target = prepare(observation, model, unrolled=self.local_steps == "unroll", unread=unread)
        if self.defended and self.local_steps == "ignore":
            check_one_step(observation)
        names = select(model, self.layers, list(target.observed[0]))
        chosen = tuple({n: one[n] for n in names} for one in target.observed)
        statistics = observed_statistics(observation, model) if self.batch_norm else {}
        return replace(target, observed=chosen, statistics=statistics)

    def solve(
        self, chunk: Chunk, width: int, *, seed: int, device: torch.device, advance: Advance
    ) -> list[Reconstruction]:
        """All targets of a chunk in one batch that has room for ``width`` of them."""
        start = time.perf_counter()
        dtype = getattr(torch, self.dtype)
        batch = make_batch(
            chunk,
            restarts=self.restarts,
            lanes=lane_count(width, self.restarts, device),
            device=device,
            seed=seed,
            dtype=dtype,
            unrolled=self.local_steps == "unroll",
            defense=defenses_of(chunk.observation) if self.defended else (),
        )

        def draw(shape: tuple[int, ...], stream: str) -> Tensor:
            drawn = lane_draws(
                chunk, shape, stream, lanes=len(batch.labels), restarts=self.restarts, seed=seed
            )
            return drawn.to(device, dtype)

        inputs = draw((chunk.images, *batch.task.input_shape), "initial inputs")
        seen = (self.scale(batch.observed), batch.statistics)
        problem = Problem(batch, seen, partial(self.objective, batch), draw)
        if self.defended:
            check_defended(problem.objective, batch.client.defense, (inputs, batch.labels, seen))
        results = self.select(chunk, batch, self.optimize(problem, inputs, advance))
        share = (time.perf_counter() - start) / len(chunk.targets)
        return [replace(result, seconds=share) for result in results]

    def objective(self, batch: Batch, inputs: Tensor, labels: Tensor, seen: Seen) -> Tensor:
        """Mean distance over the linked rounds plus priors; one lane, normalized ``inputs``."""
        observed, statistics = seen
        distances = [
            self.distance(masked(one, its) if self.nonzero else one, its)
            for one, its in zip(self.simulate(batch, inputs, labels), observed, strict=True)
        ]
        total = self.trust(inputs, len(observed)) * torch.stack(distances).mean()
        if self.tv:
            spatial = len(batch.task.input_shape) - 1
            total = total + self.tv * total_variation(inputs, spatial)
        if self.batch_norm:
            total = total + self.batch_norm * deviation(batch.client, statistics, inputs)
        return total

    def select(self, chunk: Chunk, batch: Batch, found: Found) -> list[Reconstruction]:
        """Keep each target's restart with the smallest objective; back to pixels, on the CPU."""
        own = found.losses[: len(chunk.targets) * self.restarts]  # the rest is padding
        losses = own.nan_to_num(nan=torch.inf, posinf=torch.inf).view(-1, self.restarts)
        best_loss, best = losses.min(1)
        lanes = torch.arange(len(best), device=best.device) * self.restarts + best
        inputs = found.inputs[lanes].nan_to_num(nan=0.0).clamp(*box(batch.task, found.inputs))
        pixels = batch.task.denormalize(inputs).float().cpu()
        labels = found.labels[lanes].cpu()
        return [
            Reconstruction(
                key=target.key,
                inputs=pixels[i],
                labels=labels[i],
                outcome=outcome(loss),
                loss=loss,
            )
            for i, (target, loss) in enumerate(zip(chunk.targets, best_loss.tolist(), strict=True))
        ]


def masked(simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
    """The simulated gradient where the observed one is not zero."""
    return {n: simulated[n] * (seen != 0) for n, seen in observed.items()}


def outcome(loss: float) -> Outcome:
    """Whether the optimization ended with a number."""
    if loss == float("inf"):
        return Outcome(
            "diverged",
            "the objective is not finite: try restarts, smaller steps, weaker priors or float64",
        )
    return Outcome("completed")

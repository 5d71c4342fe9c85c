"""The gradient-matching engine: targets x restarts as one batch.

An attack brings its objective and its optimizer; the engine says which targets can
share a batch, builds that batch padded to a fixed width, and lets the attack simulate
the client inside `torch.func`, so that one call serves every lane (a lane is one
restart of one target).

Two properties hold by construction and are tested: a target's result does not depend
on its mates or its position in the batch, and nothing waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from adversaries.local_steps import Client, Sent, buffers_left, skeleton
from adversaries.targets import Target, Unattackable, members_of, prepare, training_of
from adversaries.tokens import refuse_tokens
from fl_privacy.defenses import Defense
from fl_privacy.recording import RecordingError
from fl_privacy.seeding import generator
from fl_privacy.types import Failure, Observation, Task, Tensors

R = TypeVar("R")


@dataclass(frozen=True)
class Chunk:
    """Targets that share a batch. ``observation`` is that of the first of them.

    ``done`` counts the observations treated before this chunk, for the progress.
    """

    model: nn.Module
    observation: Observation
    targets: Sequence[Target]
    done: int

    @property
    def images(self) -> int:
        """Images in each target."""
        return len(self.targets[0].labels)


@dataclass(frozen=True)
class Batch:
    """Lanes that share one network: everything an objective needs, on the device.

    ``observed`` holds for each linked round tensors ``[lanes, *parameter shape]``,
    ``statistics`` tensors ``[lanes, channels]``; ``labels [lanes, images]``.
    """

    client: Client
    task: Task
    observed: tuple[Tensors, ...]
    statistics: Tensors
    labels: Tensor


Prepare = Callable[[Observation, nn.Module], Target]


def chunks(observations: Sequence[Observation], width: int) -> Iterator[list[int]]:
    """Positions of the targets that share a batch, at most ``width`` images together.

    Targets share a batch when they were sent the same parameters and hold equally
    many images. They come in the order of their first member: results are handed on in the
    order of the observations, so those of other targets do not have to wait long.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, observation in enumerate(observations):
        exchanges = observation.exchanges
        signature = (
            *((e.global_digest, e.num_examples, e.members, e.flaw) for e in exchanges),
            observation.withheld,
            observation.local_training,
            tuple(map(id, observation.defense or ())),  # a foreign one may have no hash
        )
        groups.setdefault(signature, []).append(i)
    yield from sorted(
        members[start : start + together]
        for members in groups.values()
        for together in [targets_together(observations[members[0]], width)]
        for start in range(0, len(members), together)
    )


def targets_together(observation: Observation, width: int) -> int:
    """How many targets like this one make a batch of ``width`` images; one at least."""
    return max(1, width // images_of(observation))


def images_of(observation: Observation) -> int:
    """How many images a target claims to hold; linked rounds hold the same ones."""
    return max(exchange.num_examples or 1 for exchange in observation.exchanges)


def make_batch(
    chunk: Chunk,
    *,
    restarts: int,
    lanes: int,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    unrolled: bool = True,
    defense: tuple[Defense, ...] = (),
) -> Batch:
    """One batch of ``lanes`` lanes (`lane_count`).

    What is missing repeats the last target, so that a short chunk computes the same bits
    as a full one. The lanes of one target lie side by side. ``seed`` draws the orders of
    labels (`lane_labels`). ``defense`` is what the simulated clients apply.
    """
    own = [target for target in chunk.targets for _ in range(restarts)]
    every = [*own, *[own[-1]] * (lanes - len(own))]
    training = training_of(chunk.observation)
    model = copy.deepcopy(chunk.model).to(device, dtype)

    def move(tensors: Tensors) -> dict[str, Tensor]:
        return {n: t.to(device, dtype) for n, t in tensors.items()}

    sent = tuple(
        Sent(move(e.parameters), move(buffers_left(model, e.buffers)))
        for e in chunk.observation.exchanges
    )
    client = Client(
        model=model,
        training=training,
        members=members_of(chunk.observation.exchanges[0], training),
        sent=sent,
        unrolled=unrolled,
        defense=defense,
    )

    def stacked(parts: Sequence[Tensors]) -> dict[str, Tensor]:
        return {n: torch.stack([part[n] for part in parts]).to(device, dtype) for n in parts[0]}

    return Batch(
        client=client,
        task=chunk.observation.task,
        observed=tuple(stacked([lane.observed[k] for lane in every]) for k in range(len(sent))),
        statistics=stacked([lane.statistics for lane in every]),
        labels=lane_labels(chunk, client, restarts=restarts, lanes=lanes, seed=seed).to(device),
    )


def lane_labels(chunk: Chunk, client: Client, *, restarts: int, lanes: int, seed: int) -> Tensor:
    """Labels ``[lanes, images]``, on the CPU.

    Where it matters which local batch, or which member of an aggregate, holds a label and
    that is not known, each restart has an order of its own; the objective tells which was
    right. Elsewhere the order is a matter of naming.
    """
    matters = not client.one_step or len(client.members) > 1

    def own(target: Target, restart: int) -> Tensor:
        if target.placed or not matters:
            return target.labels
        draw = generator(seed, target.key, restart, "label order")
        return target.labels[torch.randperm(len(target.labels), generator=draw)]

    labels = [own(target, restart) for target in chunk.targets for restart in range(restarts)]
    return torch.stack([*labels, *[labels[-1]] * (lanes - len(labels))])


def lane_draws(
    chunk: Chunk, shape: tuple[int, ...], stream: str, *, lanes: int, restarts: int, seed: int
) -> Tensor:
    """Standard normal draws ``[lanes, *shape]``, on the CPU.

    Each lane has its own generator, seeded by (seed, key, restart, stream), so a draw
    depends on nothing else in the batch.
    """
    draws = [
        torch.randn(shape, generator=generator(seed, target.key, restart, stream))
        for target in chunk.targets
        for restart in range(restarts)
    ]
    return torch.stack([*draws, *[draws[-1]] * (lanes - len(draws))])


def box(task: Task, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of normalized inputs, each ``[*input_shape]``, as ``like``."""
    low, high = (
        task.normalize(torch.full(task.input_shape, v, dtype=like.dtype, device=like.device))
        for v in (task.low, task.high)
    )
    return low, high


def attack_chunks(
    observations: Sequence[Observation],
    width: int,
    solve: Callable[[Chunk], list[R]],
    prepare: Prepare = prepare,
) -> Iterator[R | Failure]:
    """Prepare, group and solve; yield one result for each observation, in their order."""
    ready: dict[int, R | Failure] = {}
    following = done = 0
    for members in chunks(observations, width):
        first = observations[members[0]]
        assert first.local_training is not None, "checked against `requires` before any work"
        model = skeleton(first.model(), first.local_training)
        targets: dict[int, Target] = {}
        for i in members:
            try:
                refuse_tokens(model, first.task)
                targets[i] = prepare(observations[i], model)
            except (Unattackable, RecordingError) as error:
                ready[i] = Failure(observations[i].key, str(error))
        if targets:
            ready.update(zip(targets, solved(solve, model, first, targets, done), strict=True))
        done += len(members)
        while following in ready:
            yield ready.pop(following)
            following += 1


def solved(
    solve: Callable[[Chunk], list[R]],
    model: nn.Module,
    observation: Observation,
    targets: dict[int, Target],
    done: int,
) -> list[R] | list[Failure]:
    """The results of a chunk; a failure for each target when the chunk cannot be treated."""
    try:
        return solve(Chunk(model, observation, tuple(targets.values()), done))
    except Unattackable as error:
        return [Failure(target.key, str(error)) for target in targets.values()]

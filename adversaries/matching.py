"""The gradient-matching engine: targets x restarts as one batch.

An attack brings its objective and its optimizer; the engine says which targets can
share a batch, builds that batch padded to a fixed width, and simulates the client's
gradient inside `torch.func`, so that one call serves every lane (a lane is one
restart of one target).

Two properties hold by construction and are tested: a target's result does not depend
on its mates or its position in the batch, and nothing waits for the device.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from adversaries.labels import infer_labels
from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, Failure, LocalTraining, Observation, Task, Tensors

R = TypeVar("R")

MAX_WIDTH = 128
"""More lanes than this gain nothing on a CPU and little on a GPU (`make bench`)."""


class Unattackable(ValueError):
    """This target cannot be treated by this attack; the message says why."""


@dataclass(frozen=True)
class Target:
    """One observation, ready for matching: gradient (float32, CPU) and labels ``[images]``."""

    key: str
    gradient: Tensors
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Lanes that share one network: everything an objective needs, on the device.

    ``gradients`` values are ``[lanes, *parameter shape]``, ``labels [lanes, images]``.
    ``model`` is only a skeleton for `functional_call`; its weights are ``parameters``.
    """

    model: nn.Module
    parameters: Tensors
    buffers: Tensors
    task: Task
    gradients: Tensors
    labels: Tensor

    def simulate(self, inputs: Tensor, labels: Tensor) -> Tensors:
        """Gradient of the mean loss on ``inputs [images, *input_shape]`` (normalized), one lane."""

        def loss(parameters: Tensors) -> Tensor:
            outputs = functional_call(self.model, {**parameters, **self.buffers}, (inputs,))
            return F.cross_entropy(outputs, labels)

        gradients: Tensors = grad(loss)(self.parameters)
        return gradients


def single_step_gradient(exchange: Exchange, training: LocalTraining) -> dict[str, Tensor]:
    """The loss gradient behind an update of one SGD step: ``-update / lr - weight_decay * w``.

    Exact for plain SGD; momentum starts at zero in each round and has no effect on
    the first step.

    Raises:
        Unattackable: the update holds several steps, or values that are not finite.
    """
    if exchange.num_examples is None:
        raise Unattackable(
            "the number of examples behind the update is unknown: expected a num-examples metric "
            "in the client's reply"
        )
    steps = training.steps(exchange.num_examples)
    if steps != 1:
        raise Unattackable(
            f"the update holds {steps} local steps, so it is not a gradient: this attack needs one "
            f"step (algorithm=fedsgd, or one epoch of one batch)"
        )
    gradient = {
        name: -update / training.lr - training.weight_decay * exchange.parameters[name]
        for name, update in exchange.update.items()
    }
    broken = [name for name, value in gradient.items() if not value.isfinite().all()]
    if broken:
        raise Unattackable(f"the update holds values that are not finite, first in {broken[0]}")
    return gradient


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


def prepare(observation: Observation, model: nn.Module) -> Target:
    """Gradient and labels of a target; labels are inferred unless granted.

    ``model`` is the `skeleton` of the observation's network.

    Raises:
        Unattackable: as `single_step_gradient`, or several exchanges in one target.
    """
    training = observation.local_training
    assert training is not None, "checked against `requires` before any work"
    if len(observation.exchanges) != 1:
        raise Unattackable(
            f"the target links {len(observation.exchanges)} rounds; this attack treats one update: "
            f"expected the threat model's unit to be 'update'"
        )
    (exchange,) = observation.exchanges
    gradient = single_step_gradient(exchange, training)
    gradient = {n: g.float() for n, g in gradient.items() if n not in observation.withheld}
    if not gradient:
        raise Unattackable("every layer of the update is withheld")
    if observation.labels is not None:
        return Target(observation.key, gradient, observation.labels)
    state = {**exchange.parameters, **exchange.buffers}
    labels = infer_labels(gradient, model, state, observation.task, exchange.num_examples or 1)
    return Target(observation.key, gradient, labels)


def skeleton(model: nn.Module, training: LocalTraining) -> nn.Module:
    """The network as the client ran it, safe under `torch.func`.

    Batch norm in train mode normalizes by the statistics of the target's own batch and
    keeps no running ones. Dropout is off: the server cannot know a client's masks.
    """
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if training.batch_norm == "train":
        torch.func.replace_all_batch_norm_modules_(model)
    return model


def chunks(observations: Sequence[Observation], width: int) -> Iterator[list[int]]:
    """Positions of the targets that share a batch, at most ``width`` together.

    Targets share a batch when they were sent the same parameters and hold equally
    many images. Groups come in the order of their first member.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, observation in enumerate(observations):
        exchanges = observation.exchanges
        signature = (
            *((e.global_digest, e.num_examples) for e in exchanges),
            observation.withheld,
            observation.local_training,
        )
        groups.setdefault(signature, []).append(i)
    for members in groups.values():
        for start in range(0, len(members), width):
            yield members[start : start + width]


def make_batch(chunk: Chunk, *, width: int, restarts: int, device: torch.device) -> Batch:
    """One batch of ``width * restarts`` lanes.

    Missing targets repeat the last one, so that a short chunk computes the same bits
    as a full one. The lanes of one target lie side by side.
    """
    targets = [*chunk.targets, *[chunk.targets[-1]] * (width - len(chunk.targets))]
    lanes = [target for target in targets for _ in range(restarts)]
    (exchange,) = chunk.observation.exchanges
    model = chunk.model.to(device)
    own = dict(model.named_buffers())
    return Batch(
        model=model,
        parameters={n: p.to(device) for n, p in exchange.parameters.items()},
        buffers={n: b.to(device) for n, b in exchange.buffers.items() if n in own},
        task=chunk.observation.task,
        gradients={
            n: torch.stack([lane.gradient[n] for lane in lanes]).to(device)
            for n in targets[0].gradient
        },
        labels=torch.stack([lane.labels for lane in lanes]).to(device),
    )


def initial_inputs(chunk: Chunk, *, width: int, restarts: int, seed: int) -> Tensor:
    """Standard normal start for every lane, ``[width * restarts, images, *input_shape]``.

    Each lane draws on the CPU from its own generator, seeded by (seed, key, restart),
    so a draw depends on nothing else in the batch.
    """
    shape = (chunk.images, *chunk.observation.task.input_shape)
    draws = [
        torch.randn(shape, generator=generator(seed, target.key, restart, "initial inputs"))
        for target in chunk.targets
        for restart in range(restarts)
    ]
    padding = [draws[-1]] * (width * restarts - len(draws))
    return torch.stack([*draws, *padding])


def box(task: Task, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of normalized inputs, each ``[*input_shape]``, as ``like``."""
    low, high = (
        task.normalize(torch.full(task.input_shape, v, dtype=like.dtype, device=like.device))
        for v in (task.low, task.high)
    )
    return low, high


def attack_chunks(
    observations: Sequence[Observation], width: int, solve: Callable[[Chunk], list[R]]
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
                targets[i] = prepare(observations[i], model)
            except Unattackable as error:
                ready[i] = Failure(observations[i].key, str(error))
        if targets:
            results = solve(Chunk(model, first, tuple(targets.values()), done))
            ready.update(zip(targets, results, strict=True))
        done += len(members)
        while following in ready:
            yield ready.pop(following)
            following += 1


def plan_width(observations: Sequence[Observation], *, restarts: int, device: torch.device) -> int:
    """How many targets one batch can hold: bounded by memory, by `MAX_WIDTH`, by the work.

    A lane is estimated at ten times its activations (forward, backward and their
    derivatives) plus six times its gradient; half of the free memory is used.
    """
    first = observations[0]
    assert first.local_training is not None
    images = first.exchanges[0].num_examples or 1
    elements = 10 * images * activations(first.model(), first.task) + 6 * sum(
        p.numel() for p in first.model().parameters()
    )
    largest = max(len(members) for members in chunks(observations, MAX_WIDTH))
    by_memory = free_memory(device) // 2 // (4 * elements * restarts)
    return max(1, min(largest, MAX_WIDTH, by_memory))


def activations(model: nn.Module, task: Task) -> int:
    """Number of values that the modules put out for one input."""
    total = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *task.input_shape))
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)

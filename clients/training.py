"""Local training of one client: FedSGD and FedAvg with plain SGD, and the two defense seams.

McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data,
AISTATS 2017, https://arxiv.org/abs/1602.05629.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients.defending import mean_stats, set_gradient, step_of
from fl_privacy.defenses import per_sample_loss
from fl_privacy.protocols import GradientDefense
from fl_privacy.types import LocalTraining, Samples, Step, Task

OnStep = Callable[[int, Samples, Tensor], None]
"""Called before each step with its number, its batch in pixel space and the batch's indices."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs ``[n, ...]`` and labels ``[n, ...]``, one value a sample: ``[n]``."""


@dataclass(frozen=True)
class TrainResult:
    """What local training leaves: ``state`` is a copy of the model's ``state_dict``.

    ``loss`` is the mean over all samples seen, each before its step; ``stats`` are the
    gradient defense's, averaged over the steps.
    """

    state: dict[str, Tensor]
    num_examples: int
    loss: float
    stats: dict[str, float] = field(default_factory=dict)


def local_train(
    model: nn.Module,
    task: Task,
    samples: Samples,
    training: LocalTraining,
    *,
    generator: Generator,
    gradient_defense: GradientDefense | None = None,
    defense_generator: Generator | None = None,
    on_step: OnStep | None = None,
    loss: Loss = per_sample_loss,
    device: torch.device | None = None,
) -> TrainResult:
    """Train ``model`` in place on ``samples``; deterministic on one thread.

    ``generator`` (CPU) draws the batches and then a seed for dropout; ``defense_generator``
    (CPU) is the gradient defense's. ``fedsgd`` takes one step on one batch (under ``shuffled``
    order a random one, under ``sequential`` the first samples) and counts that batch as its
    examples; ``fedavg`` counts all samples. ``loss`` gives one value a sample, of the model's
    outputs and the samples' labels.

    Raises:
        ValueError: no samples, no whole batch, or a gradient defense without a generator.
    """
    device = device or torch.device("cpu")
    sampling = gradient_defense.sampling if gradient_defense else "shuffle"
    batches = list(draw_batches(len(samples), training, sampling=sampling, generator=generator))
    set_mode(model.to(device), training)

    def step_on(number: int, indices: Tensor) -> Step:
        batch = samples.take(indices)
        if on_step is not None:
            on_step(number, batch, indices)
        nominal = training.batch_size if sampling == "poisson" else len(indices)
        step = step_of(model, task, batch, expected_batch_size=nominal, device=device)
        return replace(step, loss=loss)

    with private_dropout(generator, device):
        steps = (step_on(number, indices) for number, indices in enumerate(batches))
        mean_loss, stats = descend(model, steps, training, gradient_defense, defense_generator)
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    num_examples = _num_examples(len(samples), training, batches, sampling)
    return TrainResult(state, num_examples, mean_loss, stats)


def descend(
    model: nn.Module,
    steps: Iterable[Step],
    training: LocalTraining,
    defense: GradientDefense | None,
    generator: Generator | None,
) -> tuple[float, dict[str, float]]:
    """One SGD step for each of ``steps``: the mean loss of their samples, the defense's stats."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    losses, counts, stats = [], [], []
    for step in steps:
        loss, of_step = set_gradient(step, defense, generator)
        optimizer.step()
        losses.append(loss * len(step.labels))
        counts.append(len(step.labels))
        stats.append(of_step)
    return sum(losses) / max(sum(counts), 1), mean_stats(stats)


def draw_batches(
    n: int, training: LocalTraining, *, sampling: str = "shuffle", generator: Generator
) -> Iterator[Tensor]:
    """Index tensors of the batches of one round over ``n`` samples, in order.

    Under ``poisson`` sampling (DP-SGD) each sample enters each batch with probability
    ``batch_size / n``, so batches vary in size and may be empty.

    Raises:
        ValueError: no samples, or ``drop_last`` leaves no batch.
    """
    require_batch(n, training)
    if sampling == "poisson":
        rate = training.batch_size / n
        for _ in range(training.steps(n)):
            yield torch.nonzero(torch.rand(n, generator=generator) < rate).flatten()
        return
    for _ in range(1 if training.algorithm == "fedsgd" else training.epochs):
        shuffled = training.order == "shuffled"
        order = torch.randperm(n, generator=generator) if shuffled else torch.arange(n)
        batches = torch.split(order, training.batch_size)
        if training.algorithm == "fedsgd":
            batches = batches[:1]
        elif training.drop_last and n % training.batch_size:
            batches = batches[:-1]
        yield from batches


def require_batch(n: int, training: LocalTraining) -> None:
    """Refuse local training without a batch.

    Raises:
        ValueError: no samples, or ``drop_last`` leaves no batch.
    """
    if n == 0 or training.steps(n) == 0:
        raise ValueError(
            f"no batch to train on: {n} samples, batch_size {training.batch_size}, "
            f"drop_last {training.drop_last}; give the client more data or lower batch_size"
        )


def _num_examples(n: int, training: LocalTraining, batches: Sequence[Tensor], sampling: str) -> int:
    """FedAvg: all samples; FedSGD: the batch, of nominal size under Poisson sampling."""
    if training.algorithm == "fedavg":
        return n
    return len(batches[0]) if sampling == "shuffle" else min(n, training.batch_size)


@contextmanager
def private_dropout(generator: Generator, device: torch.device) -> Iterator[None]:
    """Dropout draws from a seed of ``generator``; the global state comes back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def set_mode(model: nn.Module, training: LocalTraining) -> None:
    """Train mode, but batch norm in the mode that ``training`` says."""
    model.train()
    if training.batch_norm == "eval":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    task: Task,
    samples: Samples,
    *,
    device: torch.device | None = None,
    batch_size: int = 256,
) -> tuple[float, float]:
    """Mean loss and accuracy of ``model`` in eval mode on ``samples``.

    Raises:
        ValueError: no samples.
    """
    if not len(samples):
        raise ValueError("no samples to evaluate on")
    device = device or torch.device("cpu")
    model.to(device).eval()
    loss, correct = 0.0, 0
    for indices in torch.split(torch.arange(len(samples)), batch_size):
        labels = samples.labels[indices].to(device)
        outputs = model(task.normalize(samples.inputs[indices].to(device)))
        loss += float(per_sample_loss(outputs, labels).sum())
        correct += int((outputs.argmax(1) == labels).sum())
    return loss / len(samples), correct / len(samples)

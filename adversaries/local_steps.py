"""What a client computes from its data, written so that an attack can look through it.

One step gives a gradient; several steps are unrolled (Geiping et al., "Inverting
Gradients", NeurIPS 2020, section 6; Dimitrov et al., "Data Leakage in Federated
Averaging", TMLR 2022). Everything is in gradient units: an update over minus the
learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from adversaries.defended_step import defended_gradient, defended_update
from fl_privacy.defenses import Defense, split_defenses
from fl_privacy.types import LocalTraining, Tensors

Slope = Callable[[Tensors, Tensor, Tensor], Tensors]
"""Parameters, inputs and labels of a step to its gradient."""


@dataclass(frozen=True)
class Sent:
    """What a client received: parameters and floating-point buffers, on the device."""

    parameters: Tensors
    buffers: Tensors


@dataclass(frozen=True)
class Client:
    """The client (or the clients of an aggregate) as the adversary simulates it.

    ``sent`` holds what went out in each linked round; ``members`` the number of images
    of each client behind an aggregate (one entry for a single client). With ``unrolled``
    false several steps are treated as if they were one. ``defense`` is what each client applies:
    a gradient defense in each of its steps, update defenses to its update.
    """

    model: nn.Module
    training: LocalTraining
    members: tuple[int, ...]
    sent: tuple[Sent, ...] = field(default=())
    unrolled: bool = True
    defense: tuple[Defense, ...] = ()

    @property
    def one_step(self) -> bool:
        """Whether each member takes a single step, so that an update is a gradient."""
        return not self.unrolled or all(self.training.steps(n) == 1 for n in self.members)

    def simulate(self, inputs: Tensor, labels: Tensor) -> tuple[Tensors, ...]:
        """The update of each linked round, in gradient units.

        ``inputs [images, *input_shape]`` normalized; ``labels [images]`` classes, or
        ``[images, classes]`` probabilities.
        """
        return tuple(self._round(sent, inputs, labels) for sent in self.sent)

    def _round(self, sent: Sent, inputs: Tensor, labels: Tensor) -> Tensors:
        updates = [
            {n: share * u for n, u in self._member(sent, x, y).items()}
            if share != 1
            else self._member(sent, x, y)
            for share, x, y in self._shares(inputs, labels)
        ]
        if len(updates) == 1:
            return updates[0]
        return {n: torch.stack([u[n] for u in updates]).sum(0) for n in updates[0]}

    def _shares(self, inputs: Tensor, labels: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Weight, inputs and labels of each member."""
        if len(self.members) == 1:
            yield 1.0, inputs, labels
            return
        parts = zip(
            torch.split(inputs, list(self.members)),
            torch.split(labels, list(self.members)),
            strict=True,
        )
        for count, (x, y) in zip(self.members, parts, strict=True):
            yield count / sum(self.members), x, y

    def _member(self, sent: Sent, inputs: Tensor, labels: Tensor) -> Tensors:
        own, after = split_defenses(self.defense)

        def slope(parameters: Tensors, x: Tensor, y: Tensor) -> Tensors:
            if own is not None:
                size = self.training.batch_size
                return defended_gradient(own, self.model, parameters, sent.buffers, x, y, size)
            gradients: Tensors = grad(lambda p: self._loss(sent, p, x, y))(parameters)
            return gradients

        if self.one_step:
            made, decay = slope(sent.parameters, inputs, labels), self.training.weight_decay
        else:
            made, decay = self._unrolled(slope, sent, inputs, labels), 0.0
        lr = self.training.lr
        return defended_update(after, made, sent.parameters, lr=lr, decay=decay) if after else made

    def _unrolled(self, slope: Slope, sent: Sent, inputs: Tensor, labels: Tensor) -> Tensors:
        training, current = self.training, sent.parameters
        velocity: Tensors | None = None
        for chosen in steps(training, len(labels)):
            step = slope(current, inputs[chosen], labels[chosen])
            step = {n: g + training.weight_decay * current[n] for n, g in step.items()}
            velocity = (
                {n: training.momentum * velocity[n] + g for n, g in step.items()}
                if velocity and training.momentum
                else step
            )
            current = {n: w - training.lr * velocity[n] for n, w in current.items()}
        return {n: (w - current[n]) / training.lr for n, w in sent.parameters.items()}

    def _loss(self, sent: Sent, parameters: Tensors, inputs: Tensor, labels: Tensor) -> Tensor:
        outputs = functional_call(self.model, {**parameters, **sent.buffers}, (inputs,))
        return F.cross_entropy(outputs, labels)


def steps(training: LocalTraining, images: int) -> Iterator[slice]:
    """Which images each local step sees, in the order they are held.

    The order of the images within one epoch is a matter of naming, that of labels that are
    held fixed is not (`adversaries.matching.lane_labels`). If the client shuffles anew in
    each epoch, later epochs differ from this, which is the price of not knowing the order.
    """
    if training.algorithm == "fedsgd":
        yield slice(0, images)
        return
    last = images - images % training.batch_size if training.drop_last else images
    for _ in range(training.epochs):
        for start in range(0, last, training.batch_size):
            yield slice(start, min(start + training.batch_size, last))


def skeleton(model: nn.Module, training: LocalTraining) -> nn.Module:
    """The network as the client ran it, safe under `torch.func`.

    Batch norm in train mode normalizes by the statistics of the target's own batch and
    keeps no running ones. Dropout is off: the server cannot know a client's masks.
    Activations whose kernels round differently at the end of an array are written
    differently (`STEADY`), so that a target's bits do not depend on its place in a batch.
    """
    model = steadied(copy.deepcopy(model).eval())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if training.batch_norm == "train":
        torch.func.replace_all_batch_norm_modules_(model)
    return model


def buffers_left(model: nn.Module, buffers: Tensors) -> Tensors:
    """Those that a `skeleton` still has: of batch norm in train mode there are no statistics."""
    there = {*dict(model.named_buffers()), *dict(model.named_parameters())}
    return {name: tensor for name, tensor in buffers.items() if name in there}


class Steady(nn.Module):
    """An activation written as a function whose kernels treat every element alike."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """Elementwise."""
        return self.function(inputs)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` by way of tanh."""
    return torch.tanh(0.5 * x) * 0.5 + 0.5


def elu(x: Tensor, alpha: float) -> Tensor:
    """``x`` above zero, ``alpha (exp(x) - 1)`` below."""
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def hardsigmoid(x: Tensor) -> Tensor:
    """``min(max(x + 3, 0), 6) / 6``; PyTorch's own has no second derivative."""
    return F.relu6(x + 3) / 6


STEADY: Mapping[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]] = {
    nn.Sigmoid: lambda _: sigmoid,
    nn.SiLU: lambda _: lambda x: x * sigmoid(x),
    nn.ELU: lambda module: lambda x: elu(x, module.alpha),
    nn.Hardsigmoid: lambda _: hardsigmoid,
}
"""PyTorch computes the last few elements of an array by other instructions than the rest,
which for these activations gives other last bits. (`nn.Softplus`, `nn.Mish`, `nn.SELU` and
`nn.GroupNorm` do so too and are left: with them a target's place may change last bits.)"""


def steadied(model: nn.Module) -> nn.Module:
    """The network with the activations of `STEADY` replaced, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in STEADY:
                setattr(parent, name, Steady(STEADY[type(child)](child)))
    return model

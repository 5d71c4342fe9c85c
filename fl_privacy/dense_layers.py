"""The dense layers at the end of a network, and what they see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.hooks import hooked
from fl_privacy.types import Observation, Task, Tensors

TOGETHER = 256
"""Inputs that go through a network at once."""


def linear_inputs(model: nn.Module, state: Tensors, inputs: Tensor) -> dict[str, Tensor]:
    """What each dense layer sees of normalized ``inputs [n, *input_shape]``.

    Name -> ``[n, features]``, in the order of the forward pass. ``state`` replaces
    parameters and buffers. Layers that run more than once, or on several positions of
    one input, are left out: their gradient is a sum.
    """
    calls: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, arguments: calls.setdefault(name, []).extend(arguments[:1])

    hooks = [
        module.register_forward_pre_hook(listen(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with hooked(hooks):
        functional_call(model, dict(state), (inputs,))
    return {name: seen[0] for name, seen in calls.items() if len(seen) == 1 and seen[0].ndim == 2}


def dense_tail(model: nn.Module, task: Task) -> tuple[str, ...]:
    """Names of the dense layers that end a network, in the order of the forward pass.

    The last of them has one row a class; each other has one row for each feature that the
    next one sees, which is taken to be that row's output after an activation. Empty where
    the network ends in no dense layer.
    """
    with torch.no_grad():
        seen = linear_inputs(model, {}, torch.zeros(2, *task.input_shape))
    tail: list[str] = []
    wanted = task.classes
    for name in reversed(seen):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.out_features != wanted:
            break
        tail.insert(0, name)
        wanted = layer.in_features
    return tuple(tail)


def seen_when_sent(observation: Observation, inputs: Tensor) -> dict[str, Tensor]:
    """What each layer of the `dense_tail` sees of ``inputs [n, *input_shape]``, in pixels.

    Name -> ``[n, features]``, float64. The network has the parameters and buffers that the
    client was sent (in the last of linked rounds) and is in eval mode: no dropout, and batch
    norm by its running statistics.
    """
    model, exchange = observation.model().eval(), observation.exchanges[-1]
    state = {**exchange.parameters, **exchange.buffers}
    with torch.no_grad():
        parts = [
            linear_inputs(model, state, observation.task.normalize(part))
            for part in torch.split(inputs, TOGETHER)
        ]
    tail = dense_tail(model, observation.task)
    return {name: torch.cat([part[name] for part in parts]).double() for name in tail}

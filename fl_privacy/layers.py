"""The layers that layer-wise metrics compare."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from fl_privacy.types import Task


class LayerMetricError(ValueError):
    """A layer metric that cannot be measured as asked; the message says what would change that."""


def weight_layers(model: nn.Module, task: Task) -> tuple[str, ...]:
    """Names of the modules with a ``weight`` of two or more dimensions, in forward order.

    The order is that of each weight's first use, for an input of zeros in eval mode. What does
    not run is left out, and so are normalization layers, whose weights have one dimension. A
    weight that several layers share counts once, under the name that it has in
    ``model.named_parameters()`` and so in an update: `weight_of` gives it.
    """
    copy = deepcopy(model).cpu().float().eval()
    names = {id(parameter): name for name, parameter in copy.named_parameters()}
    used: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: used.update({name: None})

    for module in copy.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim >= 2:
            name = names[id(weight)].removesuffix("weight").removesuffix(".")
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        copy(task.normalize(torch.zeros(2, *task.input_shape)))
    return tuple(used)


def trained_layers(model: nn.Module, task: Task) -> tuple[str, ...]:
    """The `weight_layers` whose weight is trained: an update tells nothing of a frozen one."""
    trained = trained_names(model)
    return tuple(name for name in weight_layers(model, task) if weight_of(name) in trained)


def trained_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that training moves; a frozen one is a constant, as a buffer is."""
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def weight_of(layer: str) -> str:
    """Name of a layer's weight; a network that is nothing but the layer has no prefix."""
    return f"{layer}.weight".lstrip(".")

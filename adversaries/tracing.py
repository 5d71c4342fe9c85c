"""Which way values go through a network: found by sending a probe through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vjp

from adversaries.targets import Unattackable
from fl_privacy.dense_layers import linear_inputs
from fl_privacy.hooks import hooked
from fl_privacy.types import Task, Tensors


@dataclass(frozen=True)
class Link:
    """A layer of a chain; ``shape`` is that of one input to it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    def back(self, inputs: Tensor, slope: Tensor) -> Tensor:
        """The gradient with respect to one input from the ``slope`` at the output; all flat."""
        outputs, pull = vjp(self.module, inputs.view(1, *self.shape))[:2]
        found: Tensor = pull(slope.view_as(outputs))[0]
        return found.flatten()


def probe(task: Task) -> Tensor:
    """Two fixed random inputs, ``[2, *input_shape]``."""
    return torch.rand(2, *task.input_shape, generator=torch.Generator().manual_seed(0))


def dense_inputs(model: nn.Module, state: Tensors, inputs: Tensor) -> dict[str, Tensor]:
    """What each dense layer with a bias sees of ``inputs [n, *input_shape]``: `linear_inputs`."""
    seen = linear_inputs(model, state, inputs)
    return {n: values for n, values in seen.items() if model.get_submodule(n).bias is not None}


def chain(model: nn.Module, inputs: Tensor) -> list[Link]:
    """The layers of a network that is nothing but one layer after the other.

    Checked with ``inputs [n, *input_shape]``: the layers, one after the other, see and
    give what they do in the network. Flattening in between may be a function.

    Raises:
        Unattackable: the network is no such chain; the message names where it departs.
    """
    calls: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = []

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: calls.append((name, module, arguments))

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    with hooked(module.register_forward_pre_hook(listen(name)) for name, module in leaves):
        outputs = model(inputs)
    links: list[Link] = []
    values = inputs
    for name, module, arguments in calls:
        if any(link.module is module for link in links) and list(module.parameters()):
            raise Unattackable(
                f"{name} ({type(module).__name__}) runs more than once, so its gradient is a sum: "
                f"expected layers that run once; gradient_similarity has no such condition"
            )
        if len(arguments) != 1 or not _same(values, arguments[0]):
            raise Unattackable(_departs(f"{name} ({type(module).__name__})"))
        links.append(Link(name, module, tuple(arguments[0].shape[1:])))
        values = module(arguments[0])
    if not links or not _same(values, outputs):
        raise Unattackable(_departs("the output"))
    return links


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.flatten(), b.flatten())
    return False


def _departs(where: str) -> str:
    return (
        f"something other than a layer acts before {where}: expected one module after the other "
        f"(activations as modules, no branches); gradient_similarity has no such condition"
    )

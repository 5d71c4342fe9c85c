"""The layers between the pixels and a dense layer, where they follow one another."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_privacy.types import Task


class ChainError(ValueError):
    """The network up to a layer is not one layer after the other; the message says where."""


class Scale(nn.Module):
    """The linear part of `Task.normalize`: each channel over its standard deviation."""

    def __init__(self, std: tuple[float, ...]) -> None:
        super().__init__()
        self.std = std

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalized ``inputs [n, channels, ...]``, but for the mean."""
        std = torch.tensor(self.std, dtype=inputs.dtype, device=inputs.device)
        return inputs / std.view(-1, *(1,) * (inputs.ndim - 2))


@dataclass(frozen=True)
class Piece:
    """A layer of a chain; ``shape`` is that of one input to it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


def feature_chain(model: nn.Module, layer: str, task: Task) -> list[Piece]:
    """What leads from pixels to the input of the dense ``layer``, normalization first.

    Found, in eval mode, with fixed random inputs: each layer has to see what the one before
    gave. Flattening in between may be a function; any other function departs from the chain.

    Raises:
        ChainError: ``layer`` is not a dense layer (those that are get listed), or the network
            before it does more than one layer after the other.
    """
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if layer not in dense:
        listed = ", ".join(dense) or "none"
        raise ChainError(f"expected a dense layer, got {layer!r}; the network's: {listed}")
    inputs = torch.rand(2, *task.input_shape, generator=torch.Generator().manual_seed(0))
    calls = calls_of(deepcopy(model).cpu().float().eval(), task.normalize(inputs))
    modules = dict(model.named_modules())
    chain = [Piece("normalization", Scale(task.std), task.input_shape)]
    values = task.normalize(inputs)
    for name, seen, given in calls:
        if not torch.equal(values.flatten(), seen.flatten()):
            kind = type(modules[name]).__name__
            raise ChainError(
                f"something other than a layer acts before {name} ({kind}): expected one module "
                f"after the other (activations as modules, no branches)"
            )
        if name == layer:
            return chain
        chain.append(Piece(name, modules[name], tuple(seen.shape[1:])))
        values = given
    raise ChainError(f"{layer!r} does not run in a forward pass; choose another layer")


def calls_of(model: nn.Module, inputs: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Name, input and output of each call of a layer, copied (layers may work in place)."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    seen: list[Tensor] = []

    def listen(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        module.register_forward_hook(
            lambda _, __, output: calls.append((name, seen.pop(), output.clone()))
        )

    for name, module in model.named_modules():
        if not list(module.children()):
            listen(name, module)
    with torch.no_grad():
        model(inputs)
    return calls

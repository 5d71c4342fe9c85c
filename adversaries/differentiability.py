"""Can the attack look through this network? If not, say which layer is to blame."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adversaries.targets import Unattackable
from fl_privacy.types import Task


def check_differentiable(model: nn.Module, task: Task) -> None:
    """Try the derivative of a gradient for two lanes at once.

    Raises:
        Unattackable: it fails; the message names the layer and what to change.
    """
    layers: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: layers.append(name))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def score(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, {**parameters, **buffers}, (inputs,))
        return outputs.square().mean()

    def slope(inputs: Tensor) -> Tensor:
        gradient = grad(score)(parameters, inputs)
        return torch.stack([g.square().sum() for g in gradient.values()]).sum()

    try:
        vmap(grad(slope))(torch.rand(2, 2, *task.input_shape, generator=_fixed()))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise Unattackable(explain(model, layers, error)) from None
    finally:
        for handle in handles:
            handle.remove()


def explain(model: nn.Module, reached: list[str], error: Exception) -> str:
    """Name the layer that broke the derivative, and the remedy."""
    modules = dict(model.named_modules())
    last = reached[-1] if reached else ""
    where = f"{last} ({type(modules[last]).__name__})" if last else "the network's own forward"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "inplace" in first.lower() or "in-place" in first.lower() or "in place" in first.lower():
        remedy = "write it without in-place operations (x = x + y, inplace=False)"
    elif "double" in first.lower() or "derivative" in first.lower():
        remedy = "it has no second derivative: use an equivalent layer that has one"
    else:
        remedy = "gradient matching needs a network that torch.func can differentiate twice"
    return f"the attack cannot differentiate through {where}: {first}; {remedy}"


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)

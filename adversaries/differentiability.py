"""Can the attack look through this network? If not, say which layer is to blame."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from adversaries.targets import Unattackable
from fl_privacy.hooks import hooked
from fl_privacy.types import Task

UNSUPPORTED = (RuntimeError, NotImplementedError, ValueError, TypeError)
"""What PyTorch raises where a network cannot be transformed or does not fit its input."""

REMEDIES: Mapping[tuple[str, ...], str] = {
    ("random",): "it draws random numbers in each pass, which no server knows: draw only in "
    "train mode (nn.Dropout, F.dropout with training=self.training)",
    (".item()", "data-dependent", "control flow"): "its course depends on values: use "
    "torch.where instead of if, and no .item() or float()",
    ("inplace", "in-place", "in place"): "write it without in-place operations "
    "(x = x + y, inplace=False, no += on a buffer)",
    ("double", "derivative", "once_differentiable"): "it has no second derivative: use an "
    "equivalent that has one",
}
"""Words in an error, and what to change then."""

RECURRENT = "PyTorch cannot map it over targets: nn.LSTM can be, and a loop over nn.GRUCell"
OTHERWISE = "gradient matching needs a network that torch.func can differentiate twice"
LONGEST = 200


@dataclass(frozen=True)
class Call:
    """What a module was called with, in the order of the forward pass."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        own = f"the network itself ({type(self.module).__name__}.forward)"
        return f"{self.name} ({type(self.module).__name__})" if self.name else own


def twice_differentiable_kernels() -> AbstractContextManager[Any]:
    """Scaled dot-product attention by plain products: its fast kernels have one derivative only."""
    kernels: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
    return kernels


def check_differentiable(model: nn.Module, task: Task) -> None:
    """Try the derivative of a gradient for two lanes at once.

    Raises:
        Unattackable: it fails; the message names the layer and what to change.
    """
    inputs = torch.rand(2, *task.input_shape, generator=torch.Generator().manual_seed(0))
    with twice_differentiable_kernels():
        whole = Call("", model, (inputs,), {})
        error = problem(whole, with_inputs=False)
        if error is None:
            return
        for call in sorted(traced(model, inputs), key=lambda call: -call.name.count(".")):
            own = problem(call, with_inputs=True)
            if own is not None:
                raise Unattackable(explain(call, own))
        raise Unattackable(explain(whole, error))


def traced(model: nn.Module, inputs: Tensor) -> list[Call]:
    """Every call of a module inside the network in a forward pass, in order.

    Raises:
        Unattackable: the network does not run on such inputs.
    """
    calls: list[Call] = []
    running: list[Call] = []

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        kept = tuple(a.clone() if torch.is_tensor(a) else a for a in args)  # in-place layers
        running.append(Call(name, module, kept, kwargs))
        calls.append(running[-1])

    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(
                lambda m, a, k, name=name: enter(name, m, a, k), with_kwargs=True
            ),
            module.register_forward_hook(lambda *_: (running.pop(), None)[1]),
        ]
    try:
        with hooked(hooks), torch.no_grad():
            model(inputs)
    except UNSUPPORTED as error:
        raise Unattackable(
            f"the network does not run on inputs of shape {tuple(inputs.shape[1:])}: "
            f"{running[-1]} says {first_line(error)}; check input_shape of the task"
        ) from None
    return calls[1:]


def problem(call: Call, *, with_inputs: bool) -> Exception | None:
    """What goes wrong in the derivative of a module's gradient, mapped over two lanes.

    The gradient is that of the parameters, and ``with_inputs`` that of the inputs too.
    """
    places = [i for i, a in enumerate(call.args) if torch.is_tensor(a) and a.is_floating_point()]
    parameters = {n: p.detach() for n, p in call.module.named_parameters()}
    state = dict(call.module.named_buffers())
    if not places or not (with_inputs or parameters):
        return None

    def score(parameters: dict[str, Tensor], values: list[Tensor]) -> Tensor:
        args = list(call.args)
        for place, value in zip(places, values, strict=True):
            args[place] = value.clone()
        outputs = functional_call(call.module, {**parameters, **state}, tuple(args), call.kwargs)
        first: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return first.square().mean()

    def slope(values: list[Tensor]) -> Tensor:
        weights, inputs = grad(score, argnums=(0, 1))(parameters, values)
        slopes = [*weights.values(), *(inputs if with_inputs else [])]
        return torch.stack([g.square().sum() for g in slopes]).sum()

    try:
        vmap(grad(slope))([torch.stack([call.args[i]] * 2) for i in places])
    except UNSUPPORTED as error:
        return error
    return None


def explain(call: Call, error: Exception) -> str:
    """Name the layer that broke the derivative, and the remedy."""
    said = str(error).lower()
    fitting = (then for words, then in REMEDIES.items() if any(word in said for word in words))
    remedy = RECURRENT if isinstance(call.module, nn.RNNBase) else next(fitting, OTHERWISE)
    return f"the attack cannot differentiate through {call}: {first_line(error)}; {remedy}"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or as much of it as one can read."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."

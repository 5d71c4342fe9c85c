"""Weight gradients of single samples, layer by layer, without forming what need not be formed.

Layers whose gradient is a product of `factors` are called factored. All others are left to
``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from adversaries.layerwise.factors import backs, has_factors, patches, smooth
from adversaries.local_steps import skeleton
from fl_privacy.hooks import hooked
from fl_privacy.layers import LayerMetricError, weight_of
from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, LocalTraining, ModelFactory, Task


@dataclass(frozen=True)
class Network:
    """A recorded global model in eval mode: no dropout, batch norm by its running statistics.

    ``layers`` are those measured, in forward order, ``factored`` those of them that are.
    """

    model: nn.Module
    task: Task
    layers: tuple[str, ...]
    factored: tuple[str, ...]

    @property
    def whole(self) -> tuple[str, ...]:
        """The layers that are not factored."""
        return tuple(name for name in self.layers if name not in self.factored)

    @property
    def sizes(self) -> Tensor:
        """Number of weights of each layer, float64 ``[layers]``."""
        weights = (self.model.get_parameter(weight_of(name)) for name in self.layers)
        return torch.tensor([weight.numel() for weight in weights], dtype=torch.float64)

    def module(self, layer: str) -> nn.Module:
        """The module of a layer."""
        return self.model.get_submodule(layer)


@dataclass(frozen=True)
class Passed:
    """A forward pass that can be differentiated: logits ``[n, classes]``, and of each factored
    layer what it saw and what it gave."""

    logits: Tensor
    seen: Mapping[str, Tensor]
    given: Mapping[str, Tensor]

    def back(self, cotangents: Tensor, *, graph: bool = False) -> dict[str, Tensor]:
        """What comes back to each factored layer's output from ``cotangents [n, classes]``."""
        if not self.given:
            return {}
        found = torch.autograd.grad(
            self.logits,
            list(self.given.values()),
            cotangents,
            retain_graph=True,
            create_graph=graph,
            materialize_grads=True,
        )
        return dict(zip(self.given, found, strict=True))


def sent_network(
    model: ModelFactory, task: Task, sent: Exchange, layers: tuple[str, ...], device: torch.device
) -> Network:
    """The network with the parameters and buffers that were sent, its ``layers`` sorted by kind.

    A layer is factored if the product of its factors is its gradient on two random inputs: one
    that runs twice, or whose weight is used elsewhere too, is not.

    Raises:
        LayerMetricError: samples of a batch act on one another, so none has a gradient of its own.
    """
    copy = skeleton(model(), LocalTraining(batch_norm="eval"))
    double = all(p.dtype == torch.float64 for p in sent.parameters.values())
    copy = copy.to(device, torch.float64 if double else torch.float32)
    copy.load_state_dict({**sent.parameters, **sent.buffers}, strict=False)
    fitting = tuple(name for name in layers if has_factors(copy.get_submodule(name)))
    network = Network(copy, task, layers, fitting)
    inputs = torch.rand(2, *task.input_shape, generator=generator(0, "two inputs"))
    inputs = inputs.to(next(copy.parameters()))
    _refuse_mixing(network, inputs)
    agreeing = tuple(name for name in fitting if _agrees(network, name, inputs))
    return Network(copy, task, layers, agreeing)


def _refuse_mixing(network: Network, inputs: Tensor) -> None:
    with torch.no_grad():
        seen = network.task.normalize(inputs)
        together, alone = network.model(seen)[:1], network.model(seen[:1])
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-5):
        raise LayerMetricError(
            "the network's output for a sample depends on the others of its batch, so no sample "
            "has a gradient of its own: expected a network that treats samples one by one in eval "
            "mode (batch norm with running statistics)"
        )


def _agrees(network: Network, layer: str, inputs: Tensor) -> bool:
    alone = Network(network.model, network.task, (layer,), (layer,))
    passed = run(alone, inputs)
    if layer not in passed.given or passed.given[layer].shape[0] != len(inputs):
        return False
    cotangents = torch.linspace(-1, 1, passed.logits.numel()).view_as(passed.logits).to(inputs)
    back = passed.back(cotangents)[layer]
    module = network.module(layer)
    seen = patches(module, passed.seen[layer])
    found = (backs(module, back) @ seen.transpose(-1, -2)).flatten(1)
    wanted = whole_gradients(alone, (layer,), inputs, cotangents)[layer]
    close = torch.linalg.vector_norm(found - wanted) <= 1e-3 * torch.linalg.vector_norm(wanted)
    return bool(close)


def run(network: Network, inputs: Tensor, *, twice: bool = False) -> Passed:
    """A forward pass of ``inputs [n, *input_shape]``, pixels, that can be differentiated in them.

    ``twice``: more than once. Layers that run several times keep what they saw last.
    """
    seen: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., Tensor]:
        def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[name] = arguments[0]
            given[name] = smooth(module, seen[name], output) if twice else output
            return given[name].clone()  # what follows may work in place

        return note

    if not inputs.requires_grad:
        inputs = inputs.detach().requires_grad_()
    modules = {name: network.module(name) for name in network.factored}
    with hooked(m.register_forward_hook(listen(name)) for name, m in modules.items()):
        logits = network.model(network.task.normalize(inputs))
    return Passed(logits, seen, given)


def whole_gradients(
    network: Network, layers: Sequence[str], inputs: Tensor, cotangents: Tensor
) -> dict[str, Tensor]:
    """Of each sample, what comes back to the layers' weights from ``cotangents``: ``[n, weights]``.

    A forward and a backward pass for each sample, batched by ``torch.func``.
    """
    if not layers:
        return {}

    def value(weights: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        return (_logits(network, weights, x) * cotangent).sum()

    found = vmap(grad(value), (None, 0, 0))(_weights(network, layers), inputs, cotangents)
    return {name: found[weight_of(name)].flatten(1) for name in layers}


def whole_changes(
    network: Network, layers: Sequence[str], inputs: Tensor, labels: Tensor, along: Tensor
) -> dict[str, Tensor]:
    """How the weight gradients of the loss change ``along [n, *input_shape]``: ``[n, weights]``."""
    if not layers:
        return {}

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(_logits(network, weights, x), label)

    def change(x: Tensor, label: Tensor, v: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = jvp(lambda x: grad(loss)(weights, x, label), (x,), (v,))[1]
        return found

    weights = _weights(network, layers)
    found = vmap(change)(inputs, labels, along)
    return {name: found[weight_of(name)].flatten(1) for name in layers}


def _logits(network: Network, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    outputs: Tensor = functional_call(network.model, weights, (network.task.normalize(x)[None],))
    return outputs[0]


def _weights(network: Network, layers: Sequence[str]) -> dict[str, Tensor]:
    names = [weight_of(name) for name in layers]
    return {name: network.model.get_parameter(name).detach() for name in names}

"""Batch norm gives the mean and variance of its inputs away: the statistics prior.

A client in train mode moves each running statistic by ``momentum`` towards that of its
batch and returns it, so one step shows the batch's own statistics exactly. (Yin et al.,
"See through Gradients", CVPR 2021, section 3.3, match the running ones.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from adversaries.local_steps import Client
from adversaries.targets import Unattackable, members_of, training_of
from fl_privacy.hooks import hooked
from fl_privacy.types import Observation, Tensors


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers of a network by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}


def observed_statistics(observation: Observation, model: nn.Module) -> dict[str, Tensor]:
    """``<layer>.mean`` and ``<layer>.variance`` of each layer's inputs, ``[channels]`` each.

    Raises:
        Unattackable: no batch norm, batch norm in eval mode, or not one update of one step.
    """
    layers, training = batch_norm_layers(model), training_of(observation)
    if not layers:
        raise Unattackable("batch_norm > 0 needs a network with batch norm: set batch_norm=0")
    if training.batch_norm != "train":
        raise Unattackable("clients kept batch norm in eval mode, so it tells nothing of them")
    (exchange, *others) = observation.exchanges
    members = members_of(exchange, training)
    if others or len(members) > 1 or training.steps(members[0]) != 1:
        raise Unattackable("batch_norm > 0 needs one update of one local step of one client")
    found = {}
    for name, layer in layers.items():
        for own, buffer in (("mean", "running_mean"), ("variance", "running_var")):
            key, momentum = f"{name}.{buffer}", layer.momentum
            if momentum is None or key not in exchange.returned_buffers:
                raise Unattackable(f"{name} returned no {buffer} with a fixed momentum")
            before, after = exchange.buffers[key].double(), exchange.returned_buffers[key].double()
            found[f"{name}.{own}"] = (after - (1 - momentum) * before) / momentum
    return found


def deviation(client: Client, observed: Tensors, inputs: Tensor) -> Tensor:
    """Sum of squared distances of the layers' input statistics from ``observed``; one lane."""
    terms: list[Tensor] = []

    def compare(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            axes = [axis for axis in range(args[0].ndim) if axis != 1]
            terms.append((args[0].mean(axes) - observed[f"{name}.mean"]).square().sum())
            terms.append((args[0].var(axes) - observed[f"{name}.variance"]).square().sum())

        return hook

    layers = batch_norm_layers(client.model)
    sent = client.sent[0]
    with hooked(m.register_forward_pre_hook(compare(name)) for name, m in layers.items()):
        functional_call(client.model, {**sent.parameters, **sent.buffers}, (inputs,))
    return torch.stack(terms).sum()

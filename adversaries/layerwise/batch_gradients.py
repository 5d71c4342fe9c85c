"""Gradients of batches at recorded global models, as the clients would compute them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from adversaries.local_steps import buffers_left, skeleton
from fl_privacy.component import meant
from fl_privacy.layers import LayerMetricError, trained_layers, weight_of
from fl_privacy.seeding import derive_seed
from fl_privacy.types import Exchange, LocalTraining, Observation, Samples, Tensors


def global_models(observations: Sequence[Observation]) -> tuple[Exchange, ...]:
    """One exchange for each global model that was sent, in the order of recording.

    Raises:
        LayerMetricError: no observations.
    """
    if not observations:
        raise LayerMetricError("expected at least one observation, got none: choose other rounds")
    models: dict[str, Exchange] = {}
    for exchange in (e for o in observations for e in o.exchanges):
        models.setdefault(exchange.global_digest, exchange)
    return tuple(models.values())


def chosen_layers(observation: Observation, wanted: Sequence[str]) -> tuple[str, ...]:
    """The `trained_layers` of the network that are ``wanted``, all for none, in forward order.

    Raises:
        LayerMetricError: one that does not exist, or none exists.
    """
    there = trained_layers(observation.model(), observation.task)
    if not there:
        raise LayerMetricError(
            "the network has no layer with a weight of two or more dimensions that is trained"
        )
    for name in wanted:
        if name not in there:
            raise LayerMetricError(
                f"no layer {name!r} that is trained{meant(name, there)}; layers: {', '.join(there)}"
            )
    return tuple(name for name in there if not wanted or name in wanted)


def refuse_divergence(models: Sequence[Exchange]) -> None:
    """Check that the `global_models` are made of numbers; each is read once.

    Raises:
        LayerMetricError: one is not.
    """
    for sent in models:
        for name, tensor in (*sent.parameters.items(), *sent.buffers.items()):
            if not tensor.isfinite().all():
                raise LayerMetricError(
                    f"the global model of round {sent.round} holds values that are not finite, "
                    f"first in {name}: training has diverged, so choose an earlier round"
                )


def batch_size_of(observation: Observation, given: int | None) -> int:
    """``given``, or the batch size of the clients.

    Raises:
        LayerMetricError: neither is known.
    """
    if given is None and observation.local_training is None:
        raise LayerMetricError("the clients' batch size is unknown: set batch_size")
    return given or (observation.local_training or LocalTraining()).batch_size


def gradients_of(
    observations: Sequence[Observation],
    layers: Sequence[str],
    samples: Samples,
    batches: Sequence[Tensor],
    at: Sequence[int],
    *,
    device: torch.device,
    seed: int,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Number of each batch, and layer -> gradient of its mean loss to the layer's weight.

    ``batches`` hold indices of ``samples``, ``at`` which of the `global_models` each one is
    taken at, in whose order they come. Batch norm is in the clients' mode (train: statistics
    of the batch alone, eval: the running ones that were sent) and dropout, if there is any, drops,
    as in local training.
    """
    first, models = observations[0], global_models(observations)
    network = dropping(skeleton(first.model(), first.local_training or LocalTraining())).to(device)
    for place in sorted(set(at)):
        model = models[place]
        sent = {**model.parameters, **buffers_left(network, model.buffers)}
        state = {name: tensor.to(device) for name, tensor in sent.items()}
        for i in (i for i, other in enumerate(at) if other == place):
            inputs = first.task.normalize(samples.inputs[batches[i]].to(device))
            labels = samples.labels[batches[i]].to(device)
            mask = derive_seed(seed, "dropout", i)
            yield i, weight_gradients(network, state, layers, inputs, labels, mask)


def weight_gradients(
    network: nn.Module,
    state: Tensors,
    layers: Sequence[str],
    inputs: Tensor,
    labels: Tensor,
    mask: int,
) -> dict[str, Tensor]:
    """Layer -> gradient of the mean loss; ``mask`` is the seed of dropout."""
    weights = {
        weight_of(layer): state[weight_of(layer)].detach().requires_grad_() for layer in layers
    }
    with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
        torch.default_generator.manual_seed(mask)
        if inputs.is_cuda:
            with torch.cuda.device(inputs.device):
                torch.cuda.manual_seed(mask)
        outputs = functional_call(network, {**state, **weights}, (inputs,))
    gradients = torch.autograd.grad(F.cross_entropy(outputs, labels), list(weights.values()))
    return dict(zip(layers, gradients, strict=True))


def dropping(network: nn.Module) -> nn.Module:
    """``network`` with its dropout layers in train mode, in place."""
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.train()
    return network

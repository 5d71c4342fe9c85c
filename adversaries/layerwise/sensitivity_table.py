"""What sensitivity of single samples at recorded global models adds up to, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from adversaries.layerwise.batch_gradients import (
    chosen_layers,
    global_models,
    refuse_divergence,
)
from adversaries.layerwise.sample_gradients import Network, sent_network
from fl_privacy.layers import LayerMetricError
from fl_privacy.protocols import Progress
from fl_privacy.types import NonNegativeFloat, Observation, PositiveInt, Samples, Tensors

LeastRange = Annotated[
    NonNegativeFloat,
    Field(
        description="a sample whose gradient spans no more than this at a layer is dropped there"
    ),
]
Chunk = Annotated[PositiveInt, Field(description="samples at once; bounds the memory")]
Layers = Annotated[tuple[str, ...], Field(description="layers to measure; none: all")]


def networks(
    observations: Sequence[Observation], wanted: Sequence[str], device: torch.device
) -> Iterator[Network]:
    """Each global model that was sent, once, in the order of recording.

    Raises:
        LayerMetricError: no observation, an unknown layer, a network without layers or one that
            mixes samples.
    """
    models, first = global_models(observations), observations[0]
    layers = chosen_layers(first, wanted)
    for sent in models:
        yield sent_network(first.model, first.task, sent, layers, device)


def checked(samples: Samples | None, observations: Sequence[Observation]) -> Samples:
    """Samples that fit the task, to be measured on at global models that are finite.

    Raises:
        LayerMetricError: none, of another shape, or with labels that are no classes of the task;
            or a global model whose training has diverged.
    """
    if not samples or not observations:
        what = "observation" if samples else "sample"
        raise LayerMetricError(f"expected at least one {what}, got none")
    task = observations[0].task
    if tuple(samples.inputs.shape[1:]) != task.input_shape:
        raise LayerMetricError(
            f"expected inputs of shape {task.input_shape}, got {tuple(samples.inputs.shape[1:])}: "
            f"give data of the recorded task"
        )
    low, high = int(samples.labels.min()), int(samples.labels.max())
    if low < 0 or high >= task.classes:
        raise LayerMetricError(
            f"expected labels 0 to {task.classes - 1}, got {low} to {high}: give data of the "
            f"recorded task"
        )
    refuse_divergence(global_models(observations))
    return samples


def chunks(
    samples: Samples, size: int, network: Network, progress: Progress
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Numbers of some samples, their inputs where and as the network computes, and their labels.

    ``progress`` hears of a chunk when the next one is asked for.
    """
    like, n = next(network.model.parameters()), len(samples)
    for start in range(0, n, size):
        numbers = range(start, min(start + size, n))
        some = slice(numbers.start, numbers.stop)
        inputs, labels = samples.inputs[some], samples.labels[some]
        yield numbers, inputs.to(like.device, like.dtype), labels.to(like.device)
        progress(numbers.stop, n)


def gathered(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    """Each quantity of all samples, ``[n, ...]``, from those of chunks."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def stacked(found: Sequence[Tensors]) -> dict[str, Tensor]:
    """Each quantity at all models, ``[models, n, layers]``, from those at each, ``[n, layers]``."""
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def columns_of(values: Tensors, value: Tensor, sizes: Tensor) -> Tensors:
    """`mean_and_median` of all ``values``, and the `counts` of the ``value`` that is reported."""
    told = [mean_and_median(name, each) for name, each in values.items()]
    return {n: c for one in (*told, counts(value, sizes)) for n, c in one.items()}


def per_sample(values: Tensor) -> Tensor:
    """``[models, n, layers]`` to the mean over those models where a sample counts, ``[n, layers]``.

    NaN stands for what does not count.
    """
    return values.nanmean(0)


def mean_and_median(name: str, values: Tensor) -> Tensors:
    """Two columns, over samples; NaN where none counts. ``values [models, n, layers]``."""
    each = per_sample(values)
    return {f"{name}, mean": each.nanmean(0), f"{name}, median": each.nanquantile(0.5, 0)}


def standard_error(values: Tensor) -> Tensor:
    """Of the mean over samples, ``[layers]``; NaN for fewer than two."""
    each = per_sample(values)
    used = (~each.isnan()).sum(0)
    deviation = (each - each.nanmean(0)).square().nansum(0) / (used - 1).clamp_min(0)
    return (deviation / used).sqrt()


def counts(values: Tensor, sizes: Tensor) -> Tensors:
    """How many samples count at each layer, how many do not, and how many weights it has.

    With several models also the standard deviation of the models' means.
    """
    used = (~values.isnan()).double().sum(1)
    told = {
        "samples used": used.mean(0),
        "samples dropped": values.shape[1] - used.mean(0),
        "weights": sizes,
    }
    if len(values) == 1:
        return told
    return {**told, f"deviation over {len(values)} models": values.nanmean(1).std(0)}

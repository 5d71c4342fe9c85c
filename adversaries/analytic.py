"""The analytic attack: a dense layer with a bias gives its input away exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from adversaries.matching import Chunk, attack_chunks, box
from adversaries.targets import Target, Unattackable, training_of
from adversaries.tracing import dense_inputs, probe
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import (
    Exchange,
    Failure,
    LocalTraining,
    Observation,
    Outcome,
    Reconstruction,
    Task,
    Tensors,
)


class Analytic(Component):
    """Divide the weight gradient of a dense layer by its bias gradient: `layer_input`.

    Needs one image a batch (a row of a larger batch holds a mixture) and a dense layer
    with a bias that sees the flattened input of the network, wherever in the network it
    stands. Exact for any number of local steps and linked rounds, since the image is the
    same in all of them.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"local_training"})

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Reconstruction | Failure]:
        """Solve each target in closed form; nothing is random and ``device`` is not used."""
        yield from solve_each(observations, image_of, progress)


def layer_input(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """The input of a dense layer from the gradient of one image; ``[features]``, float64.

    Row ``i`` of ``weight_gradient [rows, features]`` is ``bias_gradient [rows]`` at ``i``
    times the input (Geiping et al., NeurIPS 2020, proposition 3.1), so every row gives it.
    All are combined by least squares, ``x = sum_i db_i dW_i / sum_i db_i^2``, which has
    less rounding error than the row with the largest bias gradient.

    Raises:
        Unattackable: the bias gradient is zero everywhere.
    """
    weight, bias = weight_gradient.double(), bias_gradient.double()
    length = bias.norm()
    if length == 0:
        raise Unattackable(
            "the bias gradient of the dense layer is zero everywhere, so its rows tell nothing"
        )
    direction = bias / length
    found: Tensor = direction @ weight / length
    return found


def seen_input(observed: Sequence[Tensors], layer: str) -> Tensor:
    """`layer_input` of the layer named ``layer`` from gradients that share one input.

    Raises:
        Unattackable: the layer's gradient is withheld or zero.
    """
    weight, bias = f"{layer}.weight".lstrip("."), f"{layer}.bias".lstrip(".")
    if not all(weight in one and bias in one for one in observed):
        raise Unattackable(f"the gradient of {layer} is withheld: expected its weight and bias")
    return layer_input(
        torch.cat([one[weight] for one in observed]), torch.cat([one[bias] for one in observed])
    )


def one_image(images: int, layer: str) -> None:
    """Check that a layer's rows hold one image only.

    Raises:
        Unattackable: they hold a mixture.
    """
    if images != 1:
        raise Unattackable(
            f"the batch holds {images} images and a row of {layer}.weight mixes them: "
            f"expected one image"
        )


def solve_each(
    observations: Sequence[Observation],
    reconstruct: Callable[[Chunk], Reconstruction],
    progress: Progress,
) -> Iterator[Reconstruction | Failure]:
    """One result for each observation by an attack that treats one target at a time."""

    def solve(chunk: Chunk) -> list[Reconstruction]:
        start = time.perf_counter()
        result = reconstruct(chunk)
        progress(chunk.done + 1, len(observations))
        return [replace(result, seconds=time.perf_counter() - start)]

    yield from attack_chunks(observations, 1, solve)


def image_of(chunk: Chunk) -> Reconstruction:
    """The exact image behind the only target of a chunk.

    Raises:
        Unattackable: the network or the batch does not allow it.
    """
    observation, (target,) = chunk.observation, chunk.targets
    layer = input_layer(chunk.model, observation.task)
    one_image(chunk.images, layer)
    training = training_of(observation)
    observed = [
        without_decay(seen, exchange, training)
        for seen, exchange in zip(target.observed, observation.exchanges, strict=True)
    ]
    return reconstruction(target, observation.task, seen_input(observed, layer))


def reconstruction(target: Target, task: Task, inputs: Tensor) -> Reconstruction:
    """Normalized ``inputs [values]`` of one image as a result, in the pixel range."""
    image = inputs.float().view(1, *task.input_shape)
    return Reconstruction(
        key=target.key,
        inputs=task.denormalize(image.clamp(*box(task, image))),
        labels=target.labels,
        outcome=Outcome("completed"),
    )


def input_layer(model: nn.Module, task: Task) -> str:
    """Name of a dense layer with a bias that sees the flattened input of the network.

    Raises:
        Unattackable: there is none; the message names the first layer with weights.
    """
    inputs = probe(task)
    for name, seen in dense_inputs(model, {}, inputs).items():
        if torch.equal(seen, inputs.flatten(1)):
            return name
    first = next(((n, m) for n, m in model.named_modules() if list(m.parameters(False))), None)
    if first is None:
        raise Unattackable("the network has no layer with weights")
    raise Unattackable(
        f"no dense layer with a bias sees the {inputs[0].numel()} input values; the first layer "
        f"with weights is {first[0]} ({type(first[1]).__name__}): expected a Linear with a bias "
        f"on the flattened input; rgap treats small networks of convolutions with "
        f"invertible activations (no ReLU, pooling or batch norm), gradient_similarity has no such "
        f"condition"
    )


def without_decay(seen: Tensors, exchange: Exchange, training: LocalTraining) -> dict[str, Tensor]:
    """What was seen less the weight decay of several local steps; of one it is off already.

    The steps are linear in the weights and the loss gradients, so following a weight of
    one without any gradient gives the share of the sent weights that decay took away.
    """
    steps = training.steps(exchange.num_examples or 1)
    weight, velocity = 1.0, 0.0
    for _ in range(steps):
        velocity = training.momentum * velocity + training.weight_decay * weight
        weight -= training.lr * velocity
    share = (1 - weight) / training.lr if steps > 1 else 0.0
    sent = exchange.parameters
    return {name: value - share * sent[name].double() for name, value in seen.items()}

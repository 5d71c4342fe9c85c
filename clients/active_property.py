"""A client that makes the joint model tell a property of others: active property inference.

Melis, Song, De Cristofaro, Shmatikov: Exploiting Unintended Feature Leakage in Collaborative
Learning, S&P 2019, https://arxiv.org/abs/1805.04049, "active property inference".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Generator, Tensor, nn

from clients.property_schedule import of_kind, values_of
from clients.training import OnStep, TrainResult, local_train
from fl_privacy.component import ComponentError
from fl_privacy.datasets.properties import HAS, LACKS
from fl_privacy.defenses import per_sample_loss
from fl_privacy.hooks import hooked
from fl_privacy.layers import weight_layers
from fl_privacy.models.building import initialization
from fl_privacy.settings import RunSettings
from fl_privacy.types import LocalTraining, Samples, Task

HEAD = "property-head"
"""Name of the second head in the client's state, which Flower keeps from round to round."""

UNKNOWN = -100
"""What cross-entropy leaves out, as a label."""


class TwoHeads(nn.Module):
    """``model`` and a ``head`` on what its ``layer`` sees.

    ``inputs [n, ...]`` give ``[n, classes + 2]``: the model's logits, then the head's.
    """

    def __init__(self, model: nn.Module, layer: str, head: nn.Module) -> None:
        super().__init__()
        self.model, self.layer, self.head = model, layer, head

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, features = with_features(self.model, self.layer, inputs)
        return torch.cat([outputs, self.head(features)], 1)


def train_actively(
    model: nn.Module,
    task: Task,
    samples: Samples,
    training: LocalTraining,
    *,
    name: str,
    alpha: float,
    memory: RecordDict,
    seed: int,
    generator: Generator,
    on_step: OnStep | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Train ``model`` in place as `local_train` does, with a second head for property ``name``.

    Both are trained on `joint_loss`, with the same optimizer; the result holds the model alone,
    and its ``loss`` is the joint one. Features are the input of the last layer with a weight.
    The head is that of ``memory`` (in the first round one drawn from ``seed``), and is left
    there. With ``alpha`` 1 the model learns what it would have learned without the head. The
    authors' code calls ``1 - alpha`` alpha, and its adversary draws batches of which a fifth
    have the property; here they are as the samples come.

    Raises:
        ComponentError: no such property, no samples with or without it, or no shared layer.
        ValueError: as `local_train`.
    """
    refuse_one_kind(samples, name)
    two = two_heads(model, task, seed=seed)
    if HEAD in memory.array_records:
        two.head.load_state_dict(memory.array_records[HEAD].to_torch_state_dict())
    values = values_of(samples, name)
    known = torch.where((values == HAS) | (values == LACKS), values, UNKNOWN)
    both = Samples(samples.inputs, torch.stack([samples.labels, known], 1), samples.properties)

    def with_class_labels(step: int, batch: Samples, indices: Tensor) -> None:
        if on_step is not None:
            on_step(step, samples.take(indices), indices)

    result = local_train(
        two,
        task,
        both,
        training,
        generator=generator,
        on_step=with_class_labels,
        loss=joint_loss(alpha, task.classes),
        device=device,
    )
    memory[HEAD] = ArrayRecord(OrderedDict(_part(result.state, "head.")))
    return TrainResult(_part(result.state, "model."), result.num_examples, result.loss)


def active_training(
    settings: RunSettings, memory: RecordDict, *, seed: int
) -> Callable[..., TrainResult]:
    """`train_actively` with the settings of the run, to be called as `local_train` is."""
    return partial(
        train_actively,
        name=settings.client_property,
        alpha=settings.client_active_alpha,
        memory=memory,
        seed=seed,
    )


def refuse_one_kind(samples: Samples, name: str) -> None:
    """Refuse samples from which a second head could learn nothing.

    Raises:
        ComponentError: no such property, or all samples, or none, have it.
    """
    for kind in (HAS, LACKS):
        of_kind(samples, name, kind, least=1)


def joint_loss(alpha: float, classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``alpha L_main + (1 - alpha) L_property``, one value a sample: ``[n]``.

    Of outputs ``[n, classes + 2]`` and labels ``[n, 2]``: the class, and the property or
    `UNKNOWN`, which counts with the class alone.
    """

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        main = per_sample_loss(outputs[:, :classes], labels[:, 0])
        told = per_sample_loss(outputs[:, classes:], labels[:, 1])
        return alpha * main + (1 - alpha) * told

    return loss


def two_heads(model: nn.Module, task: Task, *, seed: int) -> TwoHeads:
    """The model with a new head on the input of its last layer with a weight.

    Raises:
        ComponentError: that layer is the only one, so that the heads share nothing.
    """
    layers = weight_layers(model, task)
    if len(layers) < 2:
        raise ComponentError(
            f"an active client's second head shares all layers but the last with the model, which "
            f"has {len(layers)}: expected two or more; choose another model"
        )
    inputs = torch.zeros(2, *task.input_shape).to(next(model.parameters()))
    with torch.no_grad():
        _, features = with_features(model.eval(), layers[-1], task.normalize(inputs))
    with initialization(seed):
        return TwoHeads(model, layers[-1], nn.Linear(features.shape[1], 2).to(features))


def with_features(model: nn.Module, layer: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The model's outputs, and what ``layer`` saw, flattened: ``[n, features]``."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    with hooked([module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))]):
        outputs = model(inputs)
    return outputs, seen[-1].flatten(1)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below ``prefix``, without it."""
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}

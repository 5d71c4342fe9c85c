"""Where defenses meet local training: the gradient of a step, and the update that leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from fl_privacy.defenses import per_sample_loss
from fl_privacy.layers import trained_names
from fl_privacy.protocols import GradientDefense, UpdateDefense
from fl_privacy.recording_format import Layout
from fl_privacy.types import Samples, Stats, Step, Task, Tensors


def step_of(
    model: nn.Module,
    task: Task,
    batch: Samples,
    *,
    expected_batch_size: int,
    device: torch.device | None = None,
) -> Step:
    """The step on ``batch`` (pixels): detached parameters, copied buffers, normalized inputs.

    Frozen parameters stand among the buffers.
    """
    inputs, labels = batch.inputs.to(device), batch.labels.to(device)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    trained = {name: parameters.pop(name) for name in trained_names(model)}
    return Step(
        model=model,
        parameters=trained,
        buffers=parameters | {name: value.clone() for name, value in model.named_buffers()},
        inputs=task.normalize(inputs),
        labels=labels,
        loss=per_sample_loss,
        expected_batch_size=expected_batch_size,
    )


def set_gradient(
    step: Step, defense: GradientDefense | None, generator: Generator | None
) -> tuple[float, Stats]:
    """Set ``.grad`` of the model's parameters to the mean loss's, or to what a defense makes.

    Returns the mean loss and the defense's statistics. Frozen parameters get no gradient. Under
    a defense an undefended forward pass gives the loss and moves the running statistics of batch
    norm, as it would without.

    Raises:
        ValueError: a defense without a generator.
    """
    step.model.zero_grad()
    if defense is None:
        loss = step.loss(step.model(step.inputs), step.labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), {}
    if generator is None:
        raise ValueError("a gradient defense needs a defense_generator")
    gradient, stats = defense.defend_gradient(step, generator=generator)
    for name in trained_names(step.model):
        parameter = step.model.get_parameter(name)
        parameter.grad = gradient[name].detach().to(parameter)
    with torch.no_grad():
        losses = step.loss(step.model(step.inputs), step.labels)
    return float(losses.sum()) / max(len(losses), 1), stats


def defend_update(
    sent: Tensors,
    returned: Tensors,
    defenses: Sequence[UpdateDefense],
    *,
    names: Sequence[str],
    generator: Generator,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returned values after ``defenses``, applied in turn to returned minus sent of ``names``.

    Everything else passes unchanged. With no defense the returned tensors themselves come
    back, untouched by rounding. Statistics are prefixed with the defense's class name.
    """
    if not defenses:
        return dict(returned), {}
    update: Tensors = {name: returned[name] - sent[name].to(returned[name]) for name in names}
    stats: dict[str, float] = {}
    for defense in defenses:
        update, of_defense = defense.defend_update(update, generator=generator)
        name = type(defense).__name__
        stats |= {f"{name}/{key}": float(value) for key, value in of_defense.items()}
    defended = {name: sent[name].to(update[name]) + update[name] for name in names}
    return {**returned, **defended}, stats


def with_aliases(state: Tensors, model: nn.Module) -> dict[str, Tensor]:
    """``state`` in which tensors that ``model`` has under several names have one value.

    It is that of the first name, the one defenses see: the others would tell what it hides.
    """
    aliases = Layout.of(model).aliases
    return {name: state[aliases.get(name, name)] for name in state}


def mean_stats(stats: Sequence[Stats]) -> dict[str, float]:
    """Average each named scalar over the steps."""
    names = stats[0] if stats else ()
    return {name: sum(float(of_step[name]) for of_step in stats) / len(stats) for name in names}

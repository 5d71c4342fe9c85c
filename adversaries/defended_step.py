"""One local step, and one update, as the client's defense leaves them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor, nn

from fl_privacy.defenses import per_sample_loss
from fl_privacy.protocols import GradientDefense, UpdateDefense
from fl_privacy.types import Step, Tensors


def defended_gradient(
    defense: GradientDefense,
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
) -> Tensors:
    """The gradient of one local step as ``defense`` leaves it.

    ``inputs [n, *input_shape]`` normalized; ``labels [n]`` classes, or ``[n, classes]``
    probabilities. Under Poisson sampling the sum is over the nominal ``batch_size``.
    """
    step = Step(
        model=model,
        parameters=parameters,
        buffers=buffers,
        inputs=inputs,
        labels=labels,
        loss=per_sample_loss,
        expected_batch_size=batch_size if defense.sampling == "poisson" else len(labels),
    )
    return defense.defend_gradient(step, generator=Generator())[0]


def defended_update(
    defenses: Sequence[UpdateDefense], gradient: Tensors, sent: Tensors, *, lr: float, decay: float
) -> dict[str, Tensor]:
    """An update in gradient units after ``defenses``, which act in weight units, on ``-lr * g``.

    A ``decay`` that the gradient is free of is part of the update: it is put in for them and
    taken out again.
    """
    update: Tensors = {n: -lr * (g + decay * sent[n]) for n, g in gradient.items()}
    for defense in defenses:
        update, _ = defense.defend_update(update, generator=Generator())
    return {n: -update[n] / lr - decay * sent[n] for n in gradient}

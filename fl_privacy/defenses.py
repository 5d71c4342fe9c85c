"""What clients, and adversaries who simulate them, both know of defenses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fl_privacy.component import ComponentError, name_of
from fl_privacy.protocols import GradientDefense, Noisy, UpdateDefense

Defense = GradientDefense | UpdateDefense


def per_sample_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits ``[n, classes]``, one value a sample: ``[n]``.

    ``labels [n]`` are classes, or ``[n, classes]`` probabilities.
    """
    return F.cross_entropy(outputs, labels, reduction="none")


def split_defenses(
    defenses: Sequence[Any],
) -> tuple[GradientDefense | None, tuple[UpdateDefense, ...]]:
    """At most one gradient defense, then any update defenses, in the order given.

    Raises:
        ComponentError: another order, two gradient defenses, or something that is neither.
    """
    gradient = [d for d in defenses[:1] if isinstance(d, GradientDefense)]
    rest = defenses[len(gradient) :]
    for defense in rest:
        if not isinstance(defense, UpdateDefense):
            raise ComponentError(
                "expected at most one gradient defense, first, and update defenses after it; "
                f"got {' + '.join(name_of('defenses', d) for d in defenses)}"
            )
    return (gradient[0] if gradient else None), tuple(rest)


def without_noise(defenses: Sequence[Defense]) -> tuple[Defense, ...]:
    """What ``defenses`` do on average: those that say so without their noise (`Noisy`)."""
    calm = (d.without_noise() if isinstance(d, Noisy) else d for d in defenses)
    return tuple(d for d in calm if d is not None)

"""Which part of a gradient an attack matches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PartError(ValueError):
    """A part of the gradient that does not exist."""


def select(model: nn.Module, layers: str, names: Sequence[str]) -> list[str]:
    """Those parameter ``names`` that belong to ``layers``, in their order.

    ``layers`` is ``all``, ``convolutions``, ``dense``, or names of modules or parameters
    joined by commas (a prefix takes everything below it).

    Raises:
        PartError: nothing is left; the message lists what there is.
    """
    if layers == "all":
        return list(names)
    kinds = {"convolutions": CONVOLUTIONS, "dense": (nn.Linear,)}
    if layers in kinds:
        wanted = [n for n, m in model.named_modules() if isinstance(m, kinds[layers])]
    else:
        wanted = [name.strip() for name in layers.split(",")]
    for prefix in wanted:
        if not any(belongs(name, prefix) for name in names) and layers not in kinds:
            raise PartError(_message(prefix, names))
    chosen = [name for name in names if any(belongs(name, prefix) for prefix in wanted)]
    if not chosen:
        raise PartError(_message(layers, names))
    return chosen


def belongs(name: str, prefix: str) -> bool:
    """Whether a parameter is ``prefix`` or lies in the module of that name."""
    return name == prefix or name.startswith(f"{prefix}.") or prefix == ""


def _message(layers: str, names: Sequence[str]) -> str:
    return (
        f"layers={layers!r} names nothing the adversary sees: expected all, convolutions, dense "
        f"or some of {', '.join(names)}"
    )

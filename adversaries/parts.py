"""Which part of a gradient an attack matches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fl_privacy.parameter_names import within

KINDS = {"convolutions": (nn.Conv1d, nn.Conv2d, nn.Conv3d), "dense": (nn.Linear,)}


class PartError(ValueError):
    """A part of the gradient that does not exist."""


def select(model: nn.Module, layers: str, names: Sequence[str]) -> list[str]:
    """Those parameter ``names`` that belong to ``layers``, in their order.

    ``layers`` are joined by commas: ``all``, ``convolutions``, ``dense``, or names of modules or
    parameters (a prefix takes everything below it). One with a minus sign in front is left
    out; with such alone the rest is taken: ``-classifier.weight``.

    Raises:
        PartError: nothing is left, or a name is unknown; the message lists what there is.
    """
    parts = [part.strip() for part in layers.split(",")]
    left_out = [part.removeprefix("-") for part in parts if part.startswith("-")]
    taken = [part for part in parts if not part.startswith("-")] or ["all"]
    dropped = {name for part in left_out for name in _under(model, part, names)}
    wanted = {name for part in taken for name in _under(model, part, names)} - dropped
    if not wanted:
        raise PartError(_message(layers, names))
    return [name for name in names if name in wanted]


def _under(model: nn.Module, part: str, names: Sequence[str]) -> list[str]:
    """The parameters of one part of ``layers``."""
    if part == "all":
        return list(names)
    if part in KINDS:
        kind = [n for n, m in model.named_modules() if isinstance(m, KINDS[part])]
        return [name for name in names if any(belongs(name, prefix) for prefix in kind)]
    found = [name for name in names if belongs(name, part)]
    if not found:
        raise PartError(_message(part, names))
    return found


def belongs(name: str, prefix: str) -> bool:
    """Whether a parameter is ``prefix`` or lies in the module of that name."""
    return prefix == "" or within(name, prefix)


def _message(layers: str, names: Sequence[str]) -> str:
    return (
        f"layers={layers!r} names nothing the adversary sees: expected all, convolutions, dense "
        f"or some of {', '.join(names)}, with - in front of what is to be left out"
    )

"""Token inputs are out of scope, and refused in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from adversaries.targets import Unattackable
from fl_privacy.hooks import hooked
from fl_privacy.types import Task


def refuse_tokens(model: nn.Module, task: Task) -> None:
    """Check that no embedding looks up what a client's inputs say.

    Raises:
        Unattackable: one does; the message names it.
    """
    name = token_table(model, task)
    if name is not None:
        raise Unattackable(
            f"{name} ({type(model.get_submodule(name)).__name__}) looks the inputs up as tokens, "
            f"which are out of scope, as integers cannot be moved along a gradient: expected a "
            f"network on real values, such as images or signals"
        )


def token_table(model: nn.Module, task: Task) -> str | None:
    """Name of an embedding that is asked for other entries when the inputs change.

    Embeddings of something else, such as positions, are not meant.
    """
    tables: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    if not tables:
        return None
    low, high = (_looked_up(model, tables, task, value) for value in (task.low, task.high))
    for name in tables:
        pairs = zip(low.get(name, []), high.get(name, []), strict=False)
        if any(one.is_floating_point() or not torch.equal(one, other) for one, other in pairs):
            return name
    return None


def _looked_up(
    model: nn.Module, tables: Mapping[str, nn.Module], task: Task, value: float
) -> dict[str, list[Tensor]]:
    """What each table is asked for when all inputs have this value."""
    asked: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, arguments: asked.setdefault(name, []).append(arguments[0].clone())

    inputs = task.normalize(torch.full((2, *task.input_shape), value))
    hooks = [table.register_forward_pre_hook(listen(name)) for name, table in tables.items()]
    with hooked(hooks), torch.no_grad(), suppress(RuntimeError, IndexError):
        model(inputs)  # whatever it says: the tables have been asked
    return asked

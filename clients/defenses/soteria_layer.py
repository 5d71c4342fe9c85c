"""The dense layer that Soteria defends: finding it, what it sees, its gradient under a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.modules.dropout import _DropoutNd

from fl_privacy.hooks import hooked
from fl_privacy.recording_format import Layout
from fl_privacy.types import Step, Tensors

Features = Callable[[Tensor], Tensor]
"""From inputs ``[n, *input_shape]`` to the features ``[n, d]`` that the defended layer sees."""


@dataclass(frozen=True)
class DenseLayer:
    """Name and module of a dense layer; ``widest`` is the largest tensor on the way to it.

    ``widest`` is in bytes a sample, for those who choose how much to do at once.
    """

    name: str
    module: nn.Linear
    widest: int


class _Reached(Exception):
    """Ends a forward pass at the defended layer, whose input it carries."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


def find_layer(step: Step, name: str) -> DenseLayer:
    """The layer called ``name``; an empty name: the first dense one that sees a vector a sample.

    One forward pass of at most two samples shows what runs and in which order.

    Raises:
        ValueError: no such layer, it is not dense, it does not see one vector a sample in one
            call, its weight is not a parameter of its own, or dropout before it draws its
            features anew in each pass.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    inputs = step.inputs[:2].detach()

    def note(module: nn.Module, given: tuple[Any, ...], output: object) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, given[0], output))

    hooks = [module.register_forward_hook(note) for module in step.model.modules()]
    with torch.no_grad(), hooked(hooks):
        functional_call(step.model, _state(step), (inputs,))
    names = {module: n for n, module in step.model.named_modules()}
    fitting = [m for m, given, _ in calls if isinstance(m, nn.Linear) and given.ndim == 2]
    once = [m for m in fitting if sum(m is other for other, *_ in calls) == 1]
    chosen = next((m for m in once if name in ("", names[m])), None)
    if chosen is None:
        listed = ", ".join(names[m] for m in once) or "none"
        raise ValueError(
            f"expected a dense layer (nn.Linear) that sees one vector a sample in one call, got "
            f"{name or 'a network without one'!r}; layers that do: {listed}"
        )
    _refuse_shared(step, f"{names[chosen]}.weight")
    before = calls[: next(i for i, (module, *_) in enumerate(calls) if module is chosen)]
    _refuse_dropout([module for module, *_ in before], names, names[chosen])
    sizes = [o.numel() * o.element_size() for _, _, o in before]
    widest = max([*sizes, inputs.numel() * inputs.element_size()]) // len(inputs)
    return DenseLayer(names[chosen], chosen, widest)


def _refuse_shared(step: Step, weight: str) -> None:
    """Refuse a weight whose gradient is not the layer's alone: pruned, it would come back whole."""
    aliases = Layout.of(step.model).aliases
    if weight in {*aliases, *aliases.values()} or weight not in step.parameters:
        raise ValueError(
            f"expected {weight} to be a trained parameter of that layer alone, got one that is "
            f"frozen, shared with another layer or computed from others; defend another layer"
        )


def _refuse_dropout(before: list[nn.Module], names: dict[nn.Module, str], layer: str) -> None:
    drawn = [names[m] for m in before if isinstance(m, _DropoutNd) and m.training and m.p > 0]
    if drawn:
        raise ValueError(
            f"the features that {layer} sees are drawn anew in each pass by {', '.join(drawn)}: "
            f"set dropout=0 or defend a layer before it"
        )


def features_of(step: Step, layer: DenseLayer) -> Features:
    """What ``layer`` sees, as a function of the inputs; nothing runs beyond the layer.

    Parameters are constants, and the step's buffers stay as they are.
    """
    state = {name: value.detach() for name, value in _state(step).items()}

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        raise _Reached(given[0])

    def features(inputs: Tensor) -> Tensor:
        with hooked([layer.module.register_forward_pre_hook(stop)]):
            try:
                functional_call(step.model, _copied(state, step), (inputs,))
            except _Reached as reached:
                return reached.features
        raise AssertionError(f"{layer.name} did not run")

    return features


def masked_gradient(step: Step, layer: DenseLayer, keep: Tensor) -> tuple[Tensors, Tensor]:
    """The mean gradient under masks ``keep [n, d]``, and the norm of what they remove.

    With ``r_i`` what the layer sees of sample i and ``delta_i`` the slope of its loss in the
    layer's output, the layer's weight gets ``sum_i delta_i (r_i * keep_i)^T`` over
    ``Step.expected_batch_size``. The forward pass is unmasked, hence all other gradients, the
    layer's bias included, are those without a defense.
    """
    shift = step.inputs.new_zeros((len(step.inputs), layer.module.out_features))

    def loss(parameters: Tensors, shift: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def shifted(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append(given[0])
            return output + shift

        with hooked([layer.module.register_forward_hook(shifted)]):
            state = {**parameters, **_copied(step.buffers, step)}
            outputs = functional_call(step.model, state, (step.inputs,))
        return step.loss(outputs, step.labels).sum() / step.expected_batch_size, seen[0]

    (gradient, delta), seen = grad(loss, argnums=(0, 1), has_aux=True)(dict(step.parameters), shift)
    removed = torch.linalg.vector_norm((delta.mT @ (seen * ~keep)).detach())
    return {**gradient, f"{layer.name}.weight": delta.mT @ (seen * keep)}, removed


def _state(step: Step) -> dict[str, Tensor]:
    return {**step.parameters, **_copied(step.buffers, step)}


def _copied(state: Tensors, step: Step) -> dict[str, Tensor]:
    """The same tensors, buffers copied: batch norm in train mode writes into them."""
    return {n: v.clone() if n in step.buffers else v for n, v in state.items()}

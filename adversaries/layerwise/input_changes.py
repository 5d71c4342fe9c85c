"""How the weight gradients of single samples change with their inputs: all layers in one pass.

A factored layer's gradient is ``back @ seen^T``, so along a direction v in the input it changes by
``back' @ seen^T + back @ seen'^T``, where ``back'`` and ``seen'`` are the directional derivatives
of what comes back to it and of what it sees. Those of all layers come from one pass: with
``w(u) = J^T u``, the vector-Jacobian product of all these parts, which is linear in u,
``J v = d(w . v)/du``. The graph of w is built once and serves every direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adversaries.layerwise.factors import backs, patches
from adversaries.layerwise.gradient_sizes import (
    Norm,
    Seen,
    change,
    norm_of,
    size,
    span,
    span_of_product,
    square_of_change,
)
from adversaries.layerwise.sample_gradients import (
    Network,
    run,
    whole_changes,
    whole_gradients,
)
from fl_privacy.seeding import generator


@dataclass(frozen=True)
class Linearized:
    """Some samples, and what tells how their gradients change with them.

    ``inputs [n, *input_shape]`` are pixels. ``seen`` and ``back`` are the factors of each factored
    layer's gradient, ``spans [n, layers]`` the ranges of all gradients. ``pulled`` is w(u) at
    ``starts``, the u of the inputs, of what each factored layer saw, and of what came back to it.
    """

    network: Network
    inputs: Tensor
    labels: Tensor
    seen: Mapping[str, Tensor]
    back: Mapping[str, Tensor]
    spans: Tensor
    starts: Sequence[Tensor]
    pulled: Tensor

    def squares(self, along: Tensor) -> Tensor:
        """Squared 2-norms of the changes ``along [n, *input_shape]``: ``[n, layers]``."""
        found = {name: size(moved, "F") for name, moved in self._whole(along).items()}
        for name, back, seen in self._factors(along):
            found[name] = square_of_change(self.back[name], self.seen[name], back, seen)
        return torch.stack([found[name] for name in self.network.layers], -1)

    def sizes(self, along: Tensor, norm: Norm) -> Tensor:
        """Sizes of the changes ``along [n, *input_shape]``: ``[n, layers]``."""
        moved = self._whole(along)
        for name, back, seen in self._factors(along):
            moved[name] = change(self.back[name], self.seen[name], back, seen)
        return torch.stack([size(moved[name], norm) for name in self.network.layers], -1)

    def _whole(self, along: Tensor) -> dict[str, Tensor]:
        return whole_changes(self.network, self.network.whole, self.inputs, self.labels, along)

    def _factors(self, along: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each factored layer, and how what comes back to it and what it sees change."""
        _, *moved = torch.autograd.grad(
            self.pulled, self.starts, along, retain_graph=True, materialize_grads=True
        )
        names = self.network.factored
        for name, seen, back in zip(names, moved[: len(names)], moved[len(names) :], strict=True):
            module = self.network.module(name)
            yield name, backs(module, back), patches(module, seen)


def linearized(network: Network, inputs: Tensor, labels: Tensor) -> Linearized:
    """Prepare samples: ``inputs [n, *input_shape]`` pixels and ``labels [n]`` on the device."""
    inputs = inputs.detach().requires_grad_()
    passed = run(network, inputs, twice=True)
    slopes = own_residual(passed.logits, labels)
    back = passed.back(slopes, graph=True)
    parts = [inputs, *passed.seen.values(), *back.values()]
    starts = [torch.zeros_like(part).requires_grad_() for part in parts]
    moving = [(p, u) for p, u in zip(parts, starts, strict=True) if p.requires_grad]
    outputs, directions = zip(*moving, strict=True)
    (pulled,) = torch.autograd.grad(outputs, inputs, directions, create_graph=True)
    inputs = inputs.detach()
    factors = {
        name: (backs(module, back[name].detach()), patches(module, passed.seen[name].detach()))
        for name, module in ((name, network.module(name)) for name in network.factored)
    }
    whole = whole_gradients(network, network.whole, inputs, slopes.detach())
    spans = [
        span(whole[name])
        if name in whole
        else span_of_product(factors[name][0], Seen(factors[name][1]))
        for name in network.layers
    ]
    return Linearized(
        network=network,
        inputs=inputs,
        labels=labels,
        seen={name: seen for name, (_, seen) in factors.items()},
        back={name: back for name, (back, _) in factors.items()},
        spans=torch.stack(spans, -1),
        starts=starts,
        pulled=pulled,
    )


def own_residual(logits: Tensor, labels: Tensor) -> Tensor:
    """``p - y``, ``[n, classes]``; ``p_y - 1`` keeps its digits as minus the sum of the others."""
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    others = logits.softmax(1) * (1 - one_hot)
    return others - one_hot * others.sum(1, keepdim=True)


def probed_norms(
    local: Linearized, probes: int, numbers: Sequence[int], seed: int
) -> tuple[Tensor, Tensor]:
    """``||dg/dx||_F`` estimated from ``probes``, and its standard error: ``[n, layers]`` float64.

    The signs of a sample are drawn by its number in ``numbers``, on the CPU. The error of the
    root is that of the mean of the squares over twice the root, to first order; NaN for one probe.
    """
    shape = (probes, *local.inputs.shape[1:])
    signs = torch.stack(
        [
            torch.randint(
                0, 2, shape, generator=generator(seed, "input_sensitivity", i), dtype=torch.int8
            )
            for i in numbers
        ],
        dim=1,
    )
    squares = torch.stack(
        [local.squares(2 * one.to(local.inputs) - 1).double().cpu() for one in signs]
    )
    norms = squares.mean(0).sqrt()
    errors = squares.std(0) / probes**0.5 / (2 * norms)
    return norms, errors.where(norms > 0, 0)


def exact_norms(local: Linearized, norm: Norm) -> Tensor:
    """Entrywise norms of ``dg/dx``, pixel by pixel: ``[n, layers]`` float64."""
    total = torch.zeros(local.spans.shape, dtype=torch.float64)
    for pixel in range(local.inputs[0].numel()):
        along = torch.zeros_like(local.inputs)
        along.flatten(1)[:, pixel] = 1
        column = local.sizes(along, norm).double().cpu()
        total = torch.maximum(total, column) if norm == "inf" else total + column
    return norm_of(total[None], 0, norm)

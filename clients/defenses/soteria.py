"""Soteria: prunes from a dense layer's gradient what tells most about the input.

Sun, Li, Wang, Pajic, Chen, Li: Soteria: Provable Defense against Privacy Leakage in Federated
Learning from Representation Perspective, CVPR 2021, https://arxiv.org/abs/2012.06043.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from clients.defenses.per_sample_clipping import batch_norm_in_train_mode
from clients.defenses.soteria_layer import DenseLayer, features_of, find_layer, masked_gradient
from clients.defenses.soteria_scores import (
    batch_costs,
    costs,
    exact_norms,
    shrunk,
    sketched_norms,
)
from fl_privacy.component import Component
from fl_privacy.protocols import GradientDefense
from fl_privacy.types import LocalTraining, PositiveInt, Stats, Step, Tensors

DUAL: dict[int | str, float] = {2: 2.0, 1: float("inf"), "inf": 1.0}
"""q with 1/p + 1/q = 1, for each p."""

AT_ONCE = 2**23
"""Bytes of the widest layer's slopes that are computed together: about what caches hold."""


class Soteria(Component):
    """Zeroes columns of a dense ``layer``'s weight gradient, for each sample its own.

    Algorithms 1 and 2 with q = 0: of each sample the share ``rate`` of the features ``r_i``
    is pruned that it costs most to move, those with the largest ``|r_i| / ||dr_i/dX||`` (the
    paper's approximation of ``||r_i (dr_i/dX)^-1||``), and the layer's weight gradient is
    ``sum_i delta_i (r_i * mask_i)^T`` over the batch size. Everything else, the layer's bias
    included, is the gradient without a defense; the forward pass is unmasked.

    Deviations: algorithm 2 takes one step a sample, here the defended gradients of a batch are
    averaged as in SGD. The rate counts, by default, among features that are not exactly zero
    (``of='active'``): dead ones have no gradient anyway. ``of='all'`` counts as the authors'
    code does, where dead features come first, black pixels among them where the layer sees the
    image: a rate below their share prunes nothing.
    ``masks='batch'`` gives all samples the mask that this code gives a batch.

    Batch norm in train mode mixes the samples: X is then the whole batch, to which exact
    scores take as many times longer as it has samples; ``scores='sketch'`` does not. The
    sketch of k probes is unbiased for ``||dr_i/dX||^2`` with relative variance 2/k, unless
    ``shrink`` trades that for more of the exact mask; in ``bfloat16`` it is the sketch of the
    network so rounded. Where slopes differ little from feature to feature, as in untrained
    networks, the size ``|r_i|`` alone decides most of the mask, and a plain sketch of few
    probes finds less of it than that: the benchmark prints both.
    """

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "shuffle"

    layer: Annotated[
        str, Field(description="dense layer; none: the first that sees one vector a sample")
    ] = ""
    rate: Annotated[float, Field(ge=0, le=1, description="share of the features to prune")] = 0.4
    of: Annotated[
        Literal["active", "all"],
        Field(description="what the rate counts: features that are not zero, or all"),
    ] = "active"
    masks: Annotated[
        Literal["sample", "batch"], Field(description="one mask a sample or one a batch")
    ] = "sample"
    scores: Annotated[
        Literal["exact", "sketch"], Field(description="slopes of each feature, or from probes")
    ] = "exact"
    probes: Annotated[PositiveInt, Field(description="forward-mode probes of the sketch")] = 32
    shrink: Annotated[
        bool, Field(description="draw sketched slopes toward their mean by what is noise")
    ] = False
    precision: Annotated[
        Literal["full", "bfloat16"], Field(description="what the sketch computes slopes in")
    ] = "full"
    norm: Annotated[Literal[2, 1, "inf"], Field(description="p of the distance between inputs")] = 2

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scores == "sketch" and self.norm != 2:
            raise ValueError(
                f"the sketch knows norm=2 only, got norm={self.norm!r}: set scores='exact'"
            )
        if self.scores == "exact" and (self.shrink or self.precision != "full"):
            raise ValueError("shrink and precision are settings of scores='sketch'")
        return self

    def without_noise(self) -> Self:
        """With exact scores: those of the sketch are noisy."""
        return self.model_copy(update={"scores": "exact", "shrink": False, "precision": "full"})

    def rehearsal(self) -> GradientDefense:
        """With exact scores the slope of one feature alone, as all take long; else the same."""
        return Rehearsed(self) if self.scores == "exact" else self

    def warning(self, model: nn.Module, training: LocalTraining) -> str:
        """That exact scores mix with batch norm to a price that few will want to pay."""
        mixing = training.batch_norm == "train" and batch_norm_in_train_mode(model)
        if self.scores != "exact" or training.batch_size == 1 or not mixing:
            return ""
        return (
            f"soteria: exact scores take {training.batch_size} times as long as without batch norm "
            f"in train mode ({', '.join(mixing)}), which mixes the {training.batch_size} samples "
            f"of a step; scores='sketch' or batch-norm = \"eval\" avoids that"
        )

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The mean gradient with pruned columns in the weight of the layer.

        Statistics: the share pruned of all features (``pruned_share``) and of the active ones
        (``effective_rate``, 0 where there are none), ``active_share``, and the norm of what was
        removed from the mean gradient. Masks are constants; for fixed ones the result is twice
        differentiable. Only the sketch draws from ``generator``.

        Raises:
            ValueError: see `soteria_layer.find_layer`.
        """
        layer = find_layer(step, self.layer)
        keep, active = self.choose(step, layer, generator)
        gradient, removed = masked_gradient(step, layer, keep)
        pruned = (active & ~keep).to(step.inputs.dtype).mean()
        alive = active.to(step.inputs.dtype).mean()
        return gradient, {
            "pruned_share": pruned,
            "effective_rate": pruned / alive.where(alive > 0, 1),
            "active_share": alive,
            "removed_norm": removed,
        }

    def choose(self, step: Step, layer: DenseLayer, generator: Generator) -> tuple[Tensor, Tensor]:
        """Which features stay and which are active: two boolean tensors ``[n, d]``."""
        inputs, features = step.inputs.detach(), features_of(step, layer)
        with torch.no_grad():
            values = features(inputs)
        active = values != 0
        norms = self.norms(step, layer, generator)
        if self.shrink:
            norms = shrunk(norms, active, self.probes)
        if self.masks == "sample":
            return kept(costs(values, norms), active, self.rate, of=self.of), active
        anywhere = active.any(0, keepdim=True)
        keep = kept(batch_costs(values, norms), anywhere, self.rate, of=self.of)
        return keep.expand_as(active), active

    def norms(self, step: Step, layer: DenseLayer, generator: Generator) -> Tensor:
        """``||dr_i/dX||`` in the norm dual to ``norm``, exact or sketched: ``[n, d]``."""
        inputs, features = step.inputs.detach(), features_of(step, layer)
        mixing = len(inputs) > 1 and bool(batch_norm_in_train_mode(step.model))
        lanes = max(1, AT_ONCE // layer.widest)
        if self.scores == "exact":
            dual = DUAL[self.norm]
            return exact_norms(features, inputs, dual=dual, mixing=mixing, lanes=lanes)
        if self.precision == "bfloat16":
            features, inputs = features_of(in_bfloat16(step), layer), inputs.bfloat16()
        found = sketched_norms(
            features, inputs, probes=self.probes, generator=generator, mixing=mixing, lanes=lanes
        )
        return found.to(step.inputs.dtype)


@dataclass(frozen=True)
class Rehearsed:
    """What shows whether ``defense`` with exact scores works on a model; prunes nothing."""

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "shuffle"
    defense: Soteria

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The mean gradient; on the way, the slope of one feature of the layer."""
        layer = find_layer(step, self.defense.layer)
        features, inputs = features_of(step, layer), step.inputs.detach()[:2]
        exact_norms(lambda x: features(x).sum(1, keepdim=True), inputs, mixing=True)
        keep = step.inputs.new_ones((len(step.inputs), layer.module.in_features), dtype=torch.bool)
        return masked_gradient(step, layer, keep)[0], {}


def in_bfloat16(step: Step) -> Step:
    """The same step with floating-point parameters and buffers in bfloat16."""
    rounded = [
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
        for tensors in (step.parameters, step.buffers)
    ]
    return replace(step, parameters=rounded[0], buffers=rounded[1])


def kept(costs: Tensor, active: Tensor, rate: float, *, of: Literal["active", "all"]) -> Tensor:
    """Which features stay when those with the largest ``costs [n, d]`` go.

    As many active ones go as ``rate`` says, rounded: of them, or of all less the dead.
    """
    features, alive = active.shape[1], active.sum(1, keepdim=True)
    count = (rate * alive).round() if of == "active" else round(rate * features) - features + alive
    ranked = costs.where(active, -1)
    order = torch.argsort(ranked, dim=1, descending=True, stable=True)
    return torch.argsort(order, dim=1) >= count

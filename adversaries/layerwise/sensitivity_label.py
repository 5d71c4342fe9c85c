"""How much each layer's gradient depends on the label side: eq. (2) of [Mo].

Mo et al.: Layer-wise Characterization of Latent Information Leakage in Federated Learning, 2020,
https://arxiv.org/abs/2010.08762.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from adversaries.layerwise.factors import backs, patches
from adversaries.layerwise.gradient_sizes import (
    Norm,
    Seen,
    norm_of,
    prepared,
    psi,
    size,
    size_of_product,
    span,
    span_of_product,
)
from adversaries.layerwise.sample_gradients import Network, run, whole_gradients
from adversaries.layerwise.sensitivity_table import (
    Chunk,
    Layers,
    LeastRange,
    checked,
    chunks,
    columns_of,
    gathered,
    networks,
    per_sample,
    stacked,
    standard_error,
)
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import LayerScores, Observation, Samples

TITLES = {"logits": "to logits", "label": "eq. (2) to the letter"}
"""What the sensitivities are called in columns."""

RATIO = "RMS over range of the gradient"


class LabelSensitivity(Component):
    """How much each layer's weight gradient changes with the label, or with the logits.

    Of a sample with logits z, p = softmax(z) and one-hot label y the gradient is
    ``g = Z^T (p - y)``, where ``Z = dz/dw``. Its Jacobian with respect to the soft label y is
    ``Z^T (p 1^T - I)``, which is eq. (2) to the letter; with respect to the logits, Z held fixed,
    ``Z^T (diag p - p p^T)``. Of either an entrywise ``norm`` is divided by psi (the square root of
    the number of weights for F, that number for 1, 1 for inf) and by the range of g over the
    layer's weights, and averaged over samples.

    For two classes eq. (2) to the letter is ``sqrt(1 + (p_y / (1 - p_y))^2)`` times the
    gradient's root mean square over its range: nothing else in it depends on the layer, and it
    grows without bound as training converges. So the value is that to the logits (for two classes
    ``sqrt(2) p_y`` times the same ratio, hence bounded) unless ``of='label'`` asks for eq. (2).
    Both stand in columns, with that ratio and the norms not divided by anything.

    Samples whose gradient spans no more than ``least_range`` at a layer (it may be zero, as where
    no unit is active) are dropped there, and counted. Batch norm is in eval mode and dropout is
    off. Of several global models, a sample's value is its mean over them.
    """

    needs: ClassVar[Literal["updates", "property", "data"]] = "data"

    of: Annotated[
        Literal["logits", "label"], Field(description="the value; label: eq. (2) to the letter")
    ] = "logits"
    norm: Annotated[Norm, Field(description="entrywise norm of the Jacobian")] = "F"
    least_range: LeastRange = 1e-12
    chunk: Chunk = 64
    layers: Layers = ()

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores:
        """In ranges of the gradient per unit of logit or label; nothing is random.

        Raises:
            LayerMetricError: no observation, no sample or one that does not fit the task, an
                unknown layer, or a network that mixes samples.
        """
        data = checked(samples, observations)
        found = []
        for network in networks(observations, self.layers, device):
            found.append(self.at(network, data, progress))
        values = stacked(found)
        value = values[TITLES[self.of]]
        return LayerScores(
            metric="label_sensitivity",
            unit=f"ranges of the gradient per unit of {self.of.removesuffix('s')}",
            layers=network.layers,
            values=per_sample(value).nanmean(0),
            standard_errors=standard_error(value),
            n=len(data),
            columns=columns_of(values, value, network.sizes),
        )

    def at(self, network: Network, data: Samples, progress: Progress = silent) -> dict[str, Tensor]:
        """Every sample's sensitivities at one model: ``[n, layers]`` float64, NaN where dropped."""
        parts = []
        for _, inputs, labels in chunks(data, self.chunk, network, progress):
            found = jacobians(network, inputs, labels, self.norm)
            parts.append(self.of_samples(found, network.sizes))
        return gathered(parts)

    def of_samples(self, found: Jacobians, sizes: Tensor) -> dict[str, Tensor]:
        """The same of some samples; ``sizes`` are those of the layers."""
        spans = found.spans.where(found.spans > self.least_range, torch.nan)
        scales = found.probabilities[..., None]
        norms = {
            "logits": norm_of(
                (scales**2 if self.norm == "F" else scales) * found.sizes, 1, self.norm
            ),
            "label": norm_of(found.sizes, 1, self.norm),
        }
        return {
            **{TITLES[of]: norm / (psi(sizes, self.norm) * spans) for of, norm in norms.items()},
            **{
                f"norm alone, to {of}": norm.where(~spans.isnan(), torch.nan)
                for of, norm in norms.items()
            },
            RATIO: (found.squares / sizes).sqrt() / spans,
        }


class Jacobians(NamedTuple):
    """Of some samples, float64 on the CPU.

    ``probabilities [n, classes]``; ``sizes [n, classes, layers]`` of the columns of the Jacobian to
    the label; ``squares`` and ``spans [n, layers]``, sum of squares and range of the gradient.
    """

    probabilities: Tensor
    sizes: Tensor
    squares: Tensor
    spans: Tensor


def jacobians(network: Network, inputs: Tensor, labels: Tensor, norm: Norm) -> Jacobians:
    """The Jacobians of ``inputs [n, *input_shape]`` and their gradients for ``labels [n]``.

    Column c is what comes back from ``p - e_c``, one class after the other, and that of the label
    is the gradient; minus ``p_c`` times it is column c of the Jacobian to the logits.
    """
    passed = run(network, inputs)
    probabilities, cotangents = residuals(passed.logits)
    seen = {
        name: prepared(patches(network.module(name), t.detach()), norm)
        for name, t in passed.seen.items()
    }
    sizes: list[list[Tensor]] = []
    own: dict[str, Tensor] = {}
    for c, cotangent in enumerate(cotangents.to(inputs.dtype).unbind(2)):
        column = {n: backs(network.module(n), d) for n, d in passed.back(cotangent).items()}
        column |= whole_gradients(network, network.whole, inputs.detach(), cotangent)
        sizes.append([size_of(column[name], seen.get(name), norm) for name in network.layers])
        here = labels == c
        for name, part in column.items():
            own.setdefault(name, torch.empty_like(part))[here] = part[here]
    squares = [size_of(own[name], seen.get(name), "F") for name in network.layers]
    spans = [
        span_of_product(own[name], seen[name]) if name in seen else span(own[name])
        for name in network.layers
    ]
    return Jacobians(
        probabilities=probabilities.cpu(),
        sizes=torch.stack([torch.stack(column, -1) for column in sizes], 1).double().cpu(),
        squares=torch.stack(squares, -1).double().cpu(),
        spans=torch.stack(spans, -1).double().cpu(),
    )


def size_of(column: Tensor, seen: Seen | None, norm: Norm) -> Tensor:
    """Sizes ``[n]`` of what comes back to a layer, or of whole gradients without ``seen``."""
    return size(column, norm) if seen is None else size_of_product(column, seen, norm)


def residuals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``p`` and ``p 1^T - I``, float64 ``[n, classes]`` and ``[n, classes, classes]``.

    The diagonal ``p_c - 1`` is minus the sum of the others, which keeps its digits as p_c nears 1.
    """
    probabilities = logits.detach().double().softmax(1)
    eye = torch.eye(logits.shape[1], dtype=torch.float64, device=logits.device)
    others = probabilities[:, :, None] * (1 - eye)
    return probabilities, others - torch.diag_embed(others.sum(1))

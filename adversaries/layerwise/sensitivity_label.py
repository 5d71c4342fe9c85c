"""How much each layer's gradient depends on the label side: eq. (2) of [Mo].

Mo et al.: Layer-wise Characterization of Latent Information Leakage in Federated Learning, 2020,
https://arxiv.org/abs/2010.08762.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.layerwise.gradient_sums import Sums, of_factors, of_vectors
from adversaries.layerwise.sample_gradients import Network, backs, patches, run, whole_gradients
from adversaries.layerwise.sensitivity_table import (
    Chunk,
    Layers,
    LeastRange,
    Norm,
    checked,
    chunks,
    counts,
    mean_and_median,
    networks,
    per_sample,
    psi,
    standard_error,
)
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import LayerScores, Observation, Samples

TITLES = {"logits": "to logits", "label": "eq. (2) to the letter"}
"""What the sensitivities are called in columns."""


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
    chunk: Chunk = 32
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
        values = {name: torch.stack([one[name] for one in found]) for name in found[0]}
        value = values[TITLES[self.of]]
        told = [mean_and_median(name, each) for name, each in values.items()]
        columns = {n: c for one in (*told, counts(value, network.sizes)) for n, c in one.items()}
        return LayerScores(
            metric="label_sensitivity",
            unit=f"ranges of the gradient per unit of {self.of.removesuffix('s')}",
            layers=network.layers,
            values=per_sample(value).nanmean(0),
            standard_errors=standard_error(value),
            n=len(data),
            columns=columns,
        )

    def at(self, network: Network, data: Samples, progress: Progress = silent) -> dict[str, Tensor]:
        """Every sample's sensitivities at one model: ``[n, layers]`` float64, NaN where dropped."""
        parts = []
        for done, inputs, labels in chunks(data, self.chunk, network):
            probabilities, columns = jacobian(network, inputs)
            parts.append(self.of_samples(columns, probabilities, labels, network.sizes))
            progress(done, len(data))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def of_samples(
        self, columns: Sums, probabilities: Tensor, labels: Tensor, sizes: Tensor
    ) -> dict[str, Tensor]:
        """The same of some samples, from their ``columns [n, classes, layers]``."""
        own = torch.arange(len(labels)), labels
        spans = (columns.highest - columns.lowest)[own]
        spans = spans.where(spans > self.least_range, torch.nan)
        norms = {
            "logits": entrywise(columns, probabilities, self.norm),
            "label": entrywise(columns, torch.ones_like(probabilities), self.norm),
        }
        return {
            **{TITLES[of]: norm / (psi(sizes, self.norm) * spans) for of, norm in norms.items()},
            **{
                f"norm alone, to {of}": norm.where(~spans.isnan(), torch.nan)
                for of, norm in norms.items()
            },
            "RMS over range of the gradient": (columns.squares[own] / sizes).sqrt() / spans,
        }


def entrywise(columns: Sums, scales: Tensor, norm: Norm) -> Tensor:
    """The norm ``[n, layers]`` of Jacobians whose columns are multiplied by ``[n, classes]``."""
    scales = scales[..., None]
    if norm == "F":
        return (scales.square() * columns.squares).sum(1).sqrt()
    if norm == "1":
        return (scales * columns.absolutes).sum(1)
    return (scales * torch.maximum(columns.highest, -columns.lowest)).amax(1)


def jacobian(network: Network, inputs: Tensor) -> tuple[Tensor, Sums]:
    """Probabilities ``[n, classes]``, and the columns of the Jacobians to the label, float64.

    Column c is what comes back from ``p - e_c``, one class after the other; minus ``p_c`` times
    it is that of the Jacobian to the logits.
    """
    passed = run(network, inputs)
    probabilities, cotangents = residuals(passed.logits)
    seen = {name: patches(network.module(name), t.detach()) for name, t in passed.seen.items()}
    of_classes = []
    for cotangent in cotangents.to(inputs.dtype).unbind(2):
        back = {n: backs(network.module(n), d) for n, d in passed.back(cotangent).items()}
        whole = whole_gradients(network, network.whole, inputs.detach(), cotangent)
        of_layers = [
            of_vectors(whole[name]) if name in whole else of_factors(back[name], seen[name])
            for name in network.layers
        ]
        of_classes.append([torch.stack(kind, -1) for kind in zip(*of_layers, strict=True)])
    columns = [torch.stack(kind, 1).double().cpu() for kind in zip(*of_classes, strict=True)]
    return probabilities.cpu(), Sums(*columns)


def residuals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``p`` and ``p 1^T - I``, float64 ``[n, classes]`` and ``[n, classes, classes]``.

    The diagonal ``p_c - 1`` is minus the sum of the others, which keeps its digits as p_c nears 1.
    """
    probabilities = logits.detach().double().softmax(1)
    eye = torch.eye(logits.shape[1], dtype=torch.float64, device=logits.device)
    others = probabilities[:, :, None] * (1 - eye)
    return probabilities, others - torch.diag_embed(others.sum(1))

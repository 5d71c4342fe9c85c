"""How much each layer's gradient depends on the input: the sensitivity of [Mo2], a reconstruction.

Mo et al.: Quantifying Information Leakage from Gradients, 2021, https://arxiv.org/abs/2105.13929.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adversaries.layerwise.gradient_sizes import Norm, psi
from adversaries.layerwise.input_changes import (
    Linearized,
    exact_norms,
    linearized,
    probed_norms,
)
from adversaries.layerwise.sample_gradients import Network
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
from fl_privacy.layers import LayerMetricError
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import LayerScores, Observation, PositiveInt, Samples

ENTRIES = 10**8
"""Of a sample's Jacobian at one layer, above which it is not formed."""

NORMALIZED, ALONE, ERROR = "to the input", "norm alone", "error of probes"


class InputSensitivity(Component):
    """How much each layer's weight gradient changes with the input's pixels.

    Of a sample with D pixels x (in the task's own range) and the gradient g of its loss to a
    layer's P weights, ``||(dg/dx) / range(g)|| / psi`` in an entrywise norm, averaged over samples;
    psi is ``sqrt(P D)`` for F, ``P D`` for 1, 1 for inf. [Mo2] leave open how the range and the
    sizes enter; this follows eq. (2) of Mo et al., 2020.

    ``||J||_F^2`` is the mean of ``||J v||^2`` over random signs v, so it is estimated from
    ``probes`` of them, drawn for each sample anew; one serves all layers in one pass. The root of
    such a mean is low by about half its squared relative error. ``exact=True`` forms the
    Jacobian, a column a pixel, and knows the norms 1 and inf too: for small networks only.

    The standard error over samples includes that of the probes, which stands in a column of its
    own. Samples whose gradient spans no more than ``least_range`` at a layer are dropped there,
    and counted. Batch norm is in eval mode and dropout is off. Of several global models, a
    sample's value is its mean over them.
    """

    needs: ClassVar[Literal["updates", "property", "data"]] = "data"

    probes: Annotated[PositiveInt, Field(description="random directions in the input")] = 64
    exact: Annotated[bool, Field(description="no probes: every pixel; small networks only")] = False
    norm: Annotated[Norm, Field(description="entrywise norm; 1 and inf with exact only")] = "F"
    least_range: LeastRange = 1e-12
    chunk: Chunk = 16
    layers: Layers = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.norm != "F" and not self.exact:
            raise ValueError(
                f"probes know the norm F only, got norm={self.norm!r}: set exact=True, which is "
                f"for small networks"
            )
        return self

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores:
        """In ranges of the gradient per unit of a pixel; only the probes are random.

        Raises:
            LayerMetricError: no observation, no sample or one that does not fit the task, an
                unknown layer, a network that mixes samples, or ``exact`` for one too large.
        """
        data = checked(samples, observations)
        found = []
        for network in networks(observations, self.layers, device):
            found.append(self.at(network, data, seed, progress))
        values = stacked(found)
        value, errors = values[NORMALIZED], per_sample(values.pop(ERROR))
        of_probes = errors.square().nansum(0).sqrt() / (~errors.isnan()).sum(0)
        columns = columns_of(values, value, network.sizes)
        return LayerScores(
            metric="input_sensitivity",
            unit="ranges of the gradient per unit of a pixel",
            layers=network.layers,
            values=per_sample(value).nanmean(0),
            standard_errors=standard_error(value),
            n=len(data),
            columns={"standard error over probes": of_probes, **columns},
        )

    def at(
        self, network: Network, data: Samples, seed: int, progress: Progress = silent
    ) -> dict[str, Tensor]:
        """Every sample's sensitivity at one model: ``[n, layers]`` float64, NaN where dropped.

        Beside it the norm not divided by anything, and the normalized one's error from probes.

        Raises:
            LayerMetricError: ``exact``, and the network is too large.
        """
        pixels = math.prod(network.task.input_shape)
        if self.exact:
            _refuse_large(network, pixels)
        scale = psi(network.sizes * pixels, self.norm)
        parts = []
        for numbers, inputs, labels in chunks(data, self.chunk, network, progress):
            local = linearized(network, inputs, labels)
            norms, errors = self.norms(local, numbers, seed)
            spans = local.spans.double().cpu()
            spans = spans.where(spans > self.least_range, torch.nan)
            parts.append(
                {
                    NORMALIZED: norms / (scale * spans),
                    ALONE: norms.where(~spans.isnan(), torch.nan),
                    ERROR: errors / (scale * spans),
                }
            )
        return gathered(parts)

    def norms(self, local: Linearized, numbers: range, seed: int) -> tuple[Tensor, Tensor]:
        """Norms ``[n, layers]`` of the samples of these ``numbers``, and their probes' errors."""
        if self.exact:
            found = exact_norms(local, self.norm)
            return found, torch.zeros_like(found)
        return probed_norms(local, self.probes, numbers, seed)


def _refuse_large(network: Network, pixels: int) -> None:
    largest = int(network.sizes.max()) * pixels
    if largest > ENTRIES:
        name = network.layers[int(network.sizes.argmax())]
        raise LayerMetricError(
            f"a sample's Jacobian at layer {name!r} has {largest:,} entries, and exact=True forms "
            f"those of at most {ENTRIES:,}: leave the layer out (layers=...), or use probes "
            f"(exact=False, norm='F')"
        )

"""Diagonal Fisher information leakage: how well noise hides an input, layer by layer.

Hannun, Guo, van der Maaten: Measuring Data Leakage in Machine-Learning Models with Fisher
Information, UAI 2021, https://arxiv.org/abs/2102.11673; Guo, Karrer, Chaudhuri, van der Maaten:
Bounding Training Data Reconstruction in Private (Deep) Learning, ICML 2022,
https://arxiv.org/abs/2201.12383.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.layerwise.batch_gradients import batch_size_of
from adversaries.layerwise.input_changes import linearized, probed_norms
from adversaries.layerwise.property_batches import BatchSize
from adversaries.layerwise.sample_gradients import Network
from adversaries.layerwise.sensitivity_table import (
    Chunk,
    Layers,
    checked,
    chunks,
    networks,
    per_sample,
    standard_error,
)
from fl_privacy.component import Component, create_all, name_of
from fl_privacy.layers import LayerMetricError
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import LayerScores, Observation, PositiveFloat, PositiveInt, Samples


class FisherLeakage(Component):
    """What each layer's gradient tells of a sample under Gaussian noise, as Fisher information.

    With the gradient g of the mean loss of a batch to a layer's weights, noise N(0, ``sigma``^2) on
    each entry, and a sample x of D pixels in the batch, all others known: ``eta^2 =
    ||dg/dx||_F^2 / (sigma^2 D)``, averaged over samples. By the bound of Cramér and Rao no
    unbiased estimator of x from that layer has a mean squared error per pixel below
    ``1 / eta^2``; the column holds that of the mean eta^2, which lies below the mean of the
    samples' own bounds. What layers tell adds up: the bound of a whole update is one over
    the sum of its layers' eta^2.

    It binds no attack that has a prior, as an image prior makes an estimator biased, and may
    exceed the error of a guess. It is the information of a gradient at a point of the network, so
    without noise, under another defense, or after clipping it does not exist: it is refused.
    ``sigma`` is in units of the gradient; without it that of the observations' defense is taken,
    where this is Gaussian noise alone and clients take one step.

    The Frobenius norm is estimated from ``probes``, see `input_sensitivity`. Batch norm is in eval
    mode and dropout is off. Of several global models, a sample's value is its mean over them.
    """

    needs: ClassVar[Literal["updates", "property", "data"]] = "data"

    sigma: Annotated[
        PositiveFloat | None,
        Field(description="deviation of the noise on a gradient's entry; none: as the defense"),
    ] = None
    batch_size: BatchSize = None
    probes: Annotated[PositiveInt, Field(description="random directions in the input")] = 64
    chunk: Chunk = 16
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
        """In one over squared pixel units; only the probes are random.

        Raises:
            LayerMetricError: no Gaussian noise, no observation, no sample or one that does not
                fit the task, an unknown layer, or a network that mixes samples.
        """
        data, first = checked(samples, observations), observations[0]
        noise = noise_of(first, self.sigma) * batch_size_of(first, self.batch_size)
        scale = noise**2 * math.prod(first.task.input_shape)
        found, errors = [], []
        for network in networks(observations, self.layers, device):
            squares, error = self.squares(network, data, seed, progress)
            found.append(squares / scale)
            errors.append(error / scale)
        values = torch.stack(found)
        mean, of_probes = per_sample(values).mean(0), per_sample(torch.stack(errors))
        return LayerScores(
            metric="fisher_leakage",
            unit="1 / squared unit of a pixel",
            layers=network.layers,
            values=mean,
            standard_errors=standard_error(values),
            n=len(data),
            columns={
                "standard error over probes": of_probes.square().sum(0).sqrt() / len(data),
                "median": per_sample(values).quantile(0.5, 0),
                "mean squared error at least, unbiased": 1 / mean,
            },
        )

    def squares(
        self, network: Network, data: Samples, seed: int, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """``||dg/dx||_F^2`` of each sample's own gradient, and its error: ``[n, layers]``."""
        squares, errors = [], []
        for numbers, inputs, labels in chunks(data, self.chunk, network, progress):
            local = linearized(network, inputs, labels)
            norms, of_norms = probed_norms(local, self.probes, numbers, seed)
            squares.append(norms.square())
            errors.append(2 * norms * of_norms)
        return torch.cat(squares), torch.cat(errors)


def noise_of(observation: Observation, sigma: float | None) -> float:
    """Standard deviation of the Gaussian noise on a gradient: ``sigma``, or the defense's.

    Raises:
        LayerMetricError: no noise is known, the defense is something else, or its noise cannot be
            put in units of a gradient.
    """
    defenses = observation.defense or ()
    if sigma is None and not defenses:
        raise LayerMetricError(
            "without noise a gradient's Fisher information is infinite: set sigma, or tell the "
            "threat model the clients' defense, such as gaussian_noise(scale=0.001)"
        )
    scale, per_step = gaussian_scale(defenses) if defenses else (1.0, True)
    if sigma is not None:
        return sigma
    if not scale:
        raise LayerMetricError("the defense's noise has scale 0, which is none: set sigma above 0")
    training = observation.local_training
    if training is None:
        raise LayerMetricError("the learning rate, in which noise on an update is, is unknown")
    images = [n for e in observation.exchanges for n in e.members or (e.num_examples or 1,)]
    if most := [training.steps(n) for n in images if training.steps(n) != 1]:
        raise LayerMetricError(
            f"clients take {most[0]} steps, so the noise is not that on one gradient: set sigma to "
            f"the deviation that a step's gradient is taken to have"
        )
    return scale if per_step else scale / training.lr


def gaussian_scale(defenses: Sequence[Any]) -> tuple[float, bool]:
    """Scale of the Gaussian noise that ``defenses`` add, and whether to each step's gradient.

    Raises:
        LayerMetricError: they do anything else.
    """
    names = [name_of("defenses", defense) for defense in defenses]
    if names == ["each_step"]:
        return gaussian_scale(create_all("defenses", defenses[0].defense))[0], True
    if names != ["gaussian_noise"]:
        raise LayerMetricError(
            f"Fisher information leakage is that under Gaussian noise, got the defense "
            f"{' + '.join(names)}: expected gaussian_noise alone"
        )
    return float(defenses[0].scale), False

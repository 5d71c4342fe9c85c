"""DP-SGD: per-sample clipping and Gaussian noise, with a guarantee for every sample.

Abadi et al.: Deep Learning with Differential Privacy, CCS 2016, algorithm 1,
https://arxiv.org/abs/1607.00133. The accounting lies in `clients.accounting`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Generator

from clients.defenses.gaussian_noise import GaussianNoise
from clients.defenses.per_sample_clipping import PerSampleClipping
from fl_privacy.component import Component
from fl_privacy.types import NonNegativeFloat, PositiveFloat, Stats, Step, Tensors


class DPSGD(Component):
    """Clips each sample's gradient to ``max_norm`` and adds noise to their sum.

    The sum of the clipped gradients plus N(0, (``noise_multiplier`` ``max_norm``)^2) in every
    entry, over ``Step.expected_batch_size``, as Opacus computes it. Batches are Poisson samples.

    With ``epsilon`` the client refuses to take part once epsilon at ``delta`` would exceed it;
    without a ``noise_multiplier`` beside it, the client chooses one with which all rounds of
    the run fit. With neither, the noise multiplier is 1 and there is no limit.
    """

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "poisson"

    noise_multiplier: Annotated[
        NonNegativeFloat | None, Field(description="noise over max_norm; none: 1, or from epsilon")
    ] = None
    max_norm: Annotated[PositiveFloat, Field(description="largest norm of a sample's gradient")] = (
        1.0
    )
    epsilon: Annotated[
        PositiveFloat | None, Field(description="budget of one client over all its rounds")
    ] = None
    delta: Annotated[float, Field(gt=0, lt=1, description="delta of the guarantee")] = 1e-5
    accountant: Annotated[
        Literal["prv", "rdp"], Field(description="prv: tight; rdp: fast, a little larger")
    ] = "prv"

    @property
    def noise(self) -> float:
        """The noise multiplier.

        Raises:
            ValueError: only an epsilon is given: the noise depends on the client's data size.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        if self.epsilon is None:
            return 1.0
        raise ValueError(
            f"dp_sgd(epsilon={self.epsilon:g}) has no noise multiplier before a client knows its "
            f"sample rate and number of steps; give one here: dp_sgd(noise_multiplier=1.0)"
        )

    def without_noise(self) -> PerSampleClipping:
        """The clipping alone."""
        return PerSampleClipping(max_norm=self.max_norm)

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The noisy mean gradient; an empty batch gives noise alone.

        ``clipped_share``, ``mean_norm`` of the samples, and the ``snr`` of the sum.

        Raises:
            ValueError: batch norm in train mode, or no noise multiplier yet.
        """
        clipping = PerSampleClipping(max_norm=self.max_norm)
        clipped, stats = clipping.defend_gradient(step, generator=generator)
        scale = self.noise * self.max_norm / step.expected_batch_size
        noisy, of_noise = GaussianNoise(scale=scale).defend_update(clipped, generator=generator)
        return noisy, {**stats, **{k: v for k, v in of_noise.items() if k == "snr"}}

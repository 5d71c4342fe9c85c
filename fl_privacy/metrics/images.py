"""How close a reconstructed image is to the true one: MSE, PSNR, SSIM.

All score inputs of `in_unit_range` (the task's range mapped to [0, 1]), clamped, after the
one-to-one matching of `fl_privacy.metrics.matching`. A result's score is the mean over its
images. torchmetrics is imported when a score is wanted, since that takes two seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.metrics.matching import matched_pairs
from fl_privacy.types import Result, Samples

PSNR_CAP = 100.0
"""Highest PSNR reported, in dB: that of an MSE of 1e-10. An exact copy has an infinite one."""

SSIM_SIGMA = 1.5
SSIM_MARGIN = 5
"""Half of the 11 x 11 window: SSIM reflects the image by this much, so it needs one pixel more."""


def mse_each(inputs: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each pair of images ``[k, *shape] -> [k]``."""
    return (inputs - truth).flatten(1).square().mean(1)


def psnr_each(inputs: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair ``[k, *shape] -> [k]``, dB, peak 1, at most 100."""
    if len(inputs) == 0:
        return inputs.new_zeros(0)
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio: Tensor = peak_signal_noise_ratio(
        inputs.flatten(1),
        truth.flatten(1),
        data_range=1.0,
        dim=1,
        reduction="none",
    )
    return ratio.clamp(max=PSNR_CAP)


def ssim_each(inputs: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each pair ``[k, C, H, W] -> [k]``, at most 1.

    Wang et al., *Image quality assessment* (2004): Gaussian window of sigma 1.5
    (11 x 11), k1 = 0.01, k2 = 0.03, range 1; the mean over all pixels of an image
    reflected at its border and over its channels. NaN where SSIM is not defined:
    inputs that are not images, or have a side shorter than 6 pixels.
    """
    if inputs.ndim != 4 or min(inputs.shape[-2:]) <= SSIM_MARGIN or len(inputs) == 0:
        return inputs.new_full((len(inputs),), torch.nan)
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(
        inputs, truth, sigma=SSIM_SIGMA, data_range=1.0, k1=0.01, k2=0.03, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(inputs))


class MSE(Component):
    """Mean squared error over pixels, channels and images."""

    unit: ClassVar[str] = "squared pixel range"
    higher_is_leakier: ClassVar[bool] = False
    set_level: ClassVar[bool] = False

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value for each result, ``[results]`` float64; lower leaks more."""
        pairs = matched_pairs(results, truths, "mse")
        return torch.tensor([float(mse_each(*pair).mean()) for pair in pairs], dtype=torch.float64)


class PSNR(Component):
    """Peak signal-to-noise ratio: mean over images of each image's PSNR, capped at 100 dB."""

    unit: ClassVar[str] = "dB"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value for each result, ``[results]`` float64; higher leaks more."""
        pairs = matched_pairs(results, truths, "psnr")
        return torch.tensor([float(psnr_each(*pair).mean()) for pair in pairs], dtype=torch.float64)


class SSIM(Component):
    """Structural similarity, settings in `ssim_each`."""

    unit: ClassVar[str] = "at most 1"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value for each result, ``[results]`` float64; NaN where it is not defined."""
        pairs = matched_pairs(results, truths, "ssim")
        return torch.tensor([float(ssim_each(*pair).mean()) for pair in pairs], dtype=torch.float64)

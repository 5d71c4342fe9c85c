"""MSE, PSNR, SSIM against scikit-image and closed forms; invariances of matched scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from fl_privacy.component import create
from fl_privacy.metrics.images import MSE, PSNR, PSNR_CAP, SSIM, mse_each, psnr_each, ssim_each
from fl_privacy.metrics.matching import assign, in_unit_range, matched
from fl_privacy.protocols import Metric
from fl_privacy.types import Outcome, PropertyScores, Reconstruction, Samples, Task

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 12, 17)]
FLOAT32 = 1e-4
"""dB; torchmetrics takes the logarithm of its range in float32."""
IMAGE_METRICS: tuple[Metric, ...] = (MSE(), PSNR(), SSIM())


def images(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, *shape), generator=generator)


def result(inputs: Tensor) -> Reconstruction:
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    return Reconstruction("aa", inputs, labels, Outcome("completed"))


def truth(inputs: Tensor) -> Samples:
    return Samples(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def scikit_ssim(a: Tensor, b: Tensor) -> float:
    """scikit-image leaves a margin of 5 out; reflecting by 5 before makes that the image."""
    pad = ((0, 0), (5, 5), (5, 5))
    first, second = (np.pad(x.double().numpy(), pad, mode="reflect") for x in (a, b))
    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            first,
            second,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_scikit_image(shape: tuple[int, ...]) -> None:
    a, b = images(5, shape, 1).double(), images(5, shape, 2).double()
    b = 0.7 * a + 0.3 * b
    for i, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        assert float(mse_each(a, b)[i]) == pytest.approx(mean_squared_error(x, y), rel=1e-12)
        psnr = peak_signal_noise_ratio(y, x, data_range=1.0)  # type: ignore[no-untyped-call]
        assert float(psnr_each(a, b)[i]) == pytest.approx(psnr, abs=FLOAT32)
        assert float(ssim_each(a, b)[i]) == pytest.approx(scikit_ssim(a[i], b[i]), abs=1e-9)


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.01])
def test_psnr_of_a_constant_error_is_its_closed_form(offset: float) -> None:
    a = torch.full((1, 1, 8, 8), 0.25, dtype=torch.float64)
    assert float(psnr_each(a, a + offset)[0]) == pytest.approx(
        -20 * math.log10(offset), abs=FLOAT32
    )


def test_a_range_other_than_0_to_1_is_mapped_before_it_is_scored() -> None:
    task = Task(input_shape=(1, 8, 8), classes=2, mean=(0.0,), std=(1.0,), low=-1.0, high=1.0)
    made = in_unit_range(result(torch.full((1, 1, 8, 8), -1.0)), task)
    true = in_unit_range(truth(torch.full((1, 1, 8, 8), -0.2)), task)
    assert float(PSNR().score([made], [true])[0]) == pytest.approx(-20 * math.log10(0.4), abs=1e-4)


def test_an_exact_copy_scores_the_cap() -> None:
    a = images(2, (3, 16, 16), 0)
    scores = [float(m.score([result(a)], [truth(a)])[0]) for m in IMAGE_METRICS]
    assert scores == pytest.approx([0.0, PSNR_CAP, 1.0], abs=1e-12)
    assert -10 * math.log10(1e-10) == PSNR_CAP


def test_a_batch_scores_the_mean_of_its_images_psnr() -> None:
    a = torch.zeros(2, 1, 8, 8)
    b = torch.stack([torch.full((1, 8, 8), 0.1), torch.full((1, 8, 8), 0.01)])
    assert float(PSNR().score([result(b)], [truth(a)])[0]) == pytest.approx((20 + 40) / 2, abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(5)), seed=st.integers(0, 1000))
def test_scores_do_not_depend_on_the_order_of_the_images(order: list[int], seed: int) -> None:
    a, b = images(5, (1, 8, 8), seed), images(5, (1, 8, 8), seed + 1)
    for metric in IMAGE_METRICS:
        straight = metric.score([result(a)], [truth(b)])
        shuffled = metric.score([result(a[order])], [truth(b)])
        assert torch.allclose(straight, shuffled, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000))
def test_matching_has_the_least_error_of_all_orders(seed: int) -> None:
    a, b = images(4, (1, 4, 4), seed), images(4, (1, 4, 4), seed + 1)
    mine, true = matched(result(a), truth(b))
    best = mse_each(mine, true).mean()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(24):
        order = torch.randperm(4, generator=generator)
        assert best <= mse_each(a[order].double(), b.double()).mean() + 1e-12


def test_shuffled_truth_is_put_back_in_order() -> None:
    b = images(6, (3, 8, 8), 3)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    mine, true = assign(b[order], b)
    assert true.tolist() == list(range(6))
    assert order[mine].tolist() == true.tolist()


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_pixels_are_clamped_before_scoring(metric: Metric) -> None:
    a, b = images(2, (1, 8, 8), 5) * 4 - 1.5, images(2, (1, 8, 8), 6)
    wild = metric.score([result(a)], [truth(b)])
    tame = metric.score([result(a.clamp(0, 1))], [truth(b)])
    assert torch.equal(wild, tame)


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_pixels_that_are_no_numbers_count_as_black_or_white(metric: Metric) -> None:
    b = images(1, (1, 8, 8), 6)
    broken, repaired = torch.zeros_like(b), torch.zeros_like(b)
    broken[..., 0, 0], broken[..., 0, 1] = math.nan, math.inf
    repaired[..., 0, 1] = 1.0
    assert torch.equal(
        metric.score([result(broken)], [truth(b)]), metric.score([result(repaired)], [truth(b)])
    )


def test_surplus_guesses_do_not_help() -> None:
    """The best of many guesses would be a choice by the truth: only the first ones count."""
    b = images(1, (1, 8, 8), 1)
    guesses = torch.cat([images(1, (1, 8, 8), 2), b])
    alone = PSNR().score([result(guesses[:1])], [truth(b)])
    assert torch.equal(PSNR().score([result(guesses)], [truth(b)]), alone)


def test_ssim_is_not_a_number_where_it_is_not_defined() -> None:
    for shape in [(1, 5, 5), (1, 100)]:
        a = images(2, shape, 0)
        assert math.isnan(float(SSIM().score([result(a)], [truth(a)])[0]))
    assert math.isfinite(
        float(SSIM().score([result(images(1, (1, 6, 6), 0))], [truth(images(1, (1, 6, 6), 1))])[0])
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected images of \(1, 8, 8\), got \(3, 8, 8\)"):
        MSE().score([result(images(1, (3, 8, 8), 0))], [truth(images(1, (1, 8, 8), 0))])
    with pytest.raises(ValueError, match="one truth for each of the 1 results, got 0"):
        MSE().score([result(images(1, (1, 8, 8), 0))], [])
    with pytest.raises(TypeError, match="got PropertyScores"):
        MSE().score(
            [PropertyScores("aa", torch.zeros(1), Outcome("completed"))],
            [truth(images(1, (1, 8, 8), 0))],
        )


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "label_accuracy"])
def test_every_metric_is_a_component_that_declares_unit_and_direction(name: str) -> None:
    metric = create("metrics", name)
    assert isinstance(metric, Metric)
    assert metric.unit
    assert not metric.set_level
    a, b = images(2, (1, 8, 8), 0), images(2, (1, 8, 8), 1)
    exact, far = metric.score([result(a), result(1 - b)], [truth(a), truth(b)]).tolist()
    if name != "label_accuracy":
        assert (exact > far) == metric.higher_is_leakier

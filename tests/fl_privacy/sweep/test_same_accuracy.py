"""The ratio of errors at the same accuracy, against curves made by hand."""

from __future__ import annotations

import math

import pytest

from fl_privacy.metrics.statistics import Interval, wilson
from fl_privacy.sweep.same_accuracy import Crossing, Dot, beside, error_at, ratio_of

FALLING = [(0.9, 0.01), (0.8, 0.1), (0.4, 1.0)]


@pytest.mark.parametrize(
    ("accuracy", "error"),
    [
        (0.9, 0.01),
        (0.8, 0.1),
        (0.4, 1.0),
        (0.85, math.sqrt(0.01 * 0.1)),
        (0.6, math.sqrt(0.1 * 1.0)),
        (0.7, 10**-0.75),
    ],
)
def test_errors_are_interpolated_on_a_logarithmic_axis(accuracy: float, error: float) -> None:
    assert error_at(FALLING, accuracy).error == pytest.approx(error)


def test_an_accuracy_that_is_never_had_is_said() -> None:
    assert error_at(FALLING, 0.95) == Crossing(None, "below")
    assert error_at(FALLING, 0.3) == Crossing(None, "above")
    assert error_at([], 0.3) == Crossing(None, "empty")
    assert error_at([(0.5, 1.0)], 0.4) == Crossing(None, "above")


def test_of_several_crossings_the_one_that_favors_the_rival_counts() -> None:
    zigzag = [(0.9, 0.01), (0.5, 0.1), (0.9, 0.2), (0.5, 0.4)]
    assert error_at(zigzag, 0.7).error == pytest.approx(math.sqrt(0.2 * 0.4))
    assert error_at(zigzag[::-1], 0.7).error == pytest.approx(math.sqrt(0.2 * 0.4))


def dot(share: float, error: float, *, images: int, spread: float = 0.02) -> Dot:
    """A point with an accuracy over ``images`` and an error of relative half width ``spread``."""
    bounds = (error * (1 - spread), error * (1 + spread))
    return Dot("1", wilson(share * images, images), Interval(error, *bounds, 50))


def test_a_curve_that_is_flat_but_for_noise_gives_no_ratio() -> None:
    flat = [dot(0.703, 0.001, images=600), dot(0.700, 0.03, images=600)]
    assert ratio_of(dot(0.702, 0.1, images=600), "other", flat).ratio is None
    sure = ratio_of(dot(0.702, 0.1, images=10**9), "other", [
        dot(0.703, 0.001, images=10**9), dot(0.700, 0.03, images=10**9)
    ])  # fmt: skip
    assert sure.ratio == pytest.approx(0.1 / (0.001 * 30 ** (1 / 3)))


def test_points_as_accurate_as_far_as_can_be_told_are_compared_instead() -> None:
    """Of the rival's, that with the largest error; nothing is interpolated."""
    own = dot(0.702, 0.1, images=600, spread=0.1)
    flat = [dot(0.71, 0.001, images=600), dot(0.70, 0.04, images=600), dot(0.5, 9.0, images=600)]
    compared = beside(own, flat)
    assert compared is not None
    assert compared.error == 0.04
    assert compared.ratio == pytest.approx(2.5)
    half = math.hypot(0.1, 0.02)
    assert compared.low == pytest.approx(2.5 * math.exp(-half), rel=0.03)
    assert compared.high == pytest.approx(2.5 * math.exp(half), rel=0.03)
    assert beside(dot(0.6, 0.1, images=10**6), flat) is None


def test_an_untold_ratio_comes_with_the_points_beside_it() -> None:
    flat = [dot(0.703, 0.001, images=600), dot(0.700, 0.03, images=600)]
    found = ratio_of(dot(0.702, 0.1, images=600), "other", flat)
    assert not found.told
    assert found.beside is not None
    assert found.beside.ratio == pytest.approx(0.1 / 0.03)


def test_the_interval_of_a_ratio_is_that_of_its_errors_where_accuracies_are_sure() -> None:
    curve = [dot(0.9, 0.1, images=10**9), dot(0.5, 0.1, images=10**9)]
    found = ratio_of(dot(0.9 - 0.2, 0.4, images=10**9, spread=0.1), "other", curve)
    # the logarithms of the reference and of the middle of two equal knots: 0.1² + 0.02² / 2
    half = math.sqrt(0.1**2 + 0.02**2 / 2)
    assert found.ratio == pytest.approx(4.0)
    assert found.low == pytest.approx(4 * math.exp(-half), rel=0.03)
    assert found.high == pytest.approx(4 * math.exp(half), rel=0.03)
    again = ratio_of(dot(0.9 - 0.2, 0.4, images=10**9, spread=0.1), "other", curve)
    assert (found.low, found.high) == (again.low, again.high)


def test_a_rival_that_is_surely_more_accurate_has_no_ratio_and_is_told() -> None:
    found = ratio_of(dot(0.3, 0.4, images=600), "other", [dot(0.9, 0.1, images=600)])
    assert (found.ratio, found.told, found.crossing.side) == (None, True, "above")
    near = ratio_of(dot(0.89, 0.4, images=600), "other", [dot(0.9, 0.1, images=600)])
    assert near.crossing.side == "above"  # one knot is never passed, whatever is drawn
    assert near.ratio is None
    two = [dot(0.9, 0.1, images=600), dot(0.895, 0.2, images=600)]
    assert not ratio_of(dot(0.89, 0.4, images=600), "other", two).told


def test_without_an_interval_a_ratio_has_none() -> None:
    alone = Dot("1", wilson(500, 600), Interval(0.1, math.nan, math.nan, 1))
    found = ratio_of(alone, "other", [dot(0.9, 0.1, images=600), dot(0.2, 0.1, images=600)])
    assert found.ratio == pytest.approx(1.0)
    assert math.isnan(found.low)

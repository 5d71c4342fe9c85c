"""The ratio of errors at the same accuracy, against curves made by hand."""

from __future__ import annotations

import math

import pytest

from fl_privacy.sweep.same_accuracy import Crossing, error_at

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

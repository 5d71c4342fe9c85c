"""The empirical lower bound on epsilon against SciPy, closed forms and its own confidence."""

import math

import numpy as np
import pytest
from scipy import stats

from fl_privacy.metrics.epsilon_bound import (
    best_threshold,
    clopper_pearson,
    epsilon_bound,
    epsilon_from_counts,
    gaussian_epsilon,
)

DELTA = 1e-5


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (497, 500), (1, 1)])
def test_clopper_pearson_is_that_of_scipy(successes: int, n: int) -> None:
    """Two one-sided bounds at alpha are SciPy's exact interval at 1 - 2 alpha."""
    low, high = clopper_pearson(successes, n, 5e-4)
    exact = stats.binomtest(successes, n).proportion_ci(0.999, method="exact")
    assert (float(low), float(high)) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_a_perfect_test_is_limited_by_its_trials_alone() -> None:
    """All hits and no alarms in n trials: bounds are alpha^(1/n), so is epsilon."""
    n, alpha = 500, 5e-4
    share = alpha ** (1 / n)
    expected = math.log((share - DELTA) / (1 - share))
    assert float(epsilon_from_counts(n, n, 0, n, delta=DELTA)) == pytest.approx(expected)
    assert epsilon_bound(np.ones(2 * n), np.zeros(2 * n), delta=DELTA).epsilon == pytest.approx(
        expected
    )


def test_both_sides_of_the_definition_count() -> None:
    """A test that errs on one side only shows as much as its complement."""
    rare = epsilon_from_counts(300, 1000, 0, 1000, delta=DELTA)
    complement = epsilon_from_counts(1000, 1000, 700, 1000, delta=DELTA)
    assert float(rare) == pytest.approx(float(complement))
    assert float(rare) > 2


def test_statistics_without_information_give_nothing() -> None:
    draws = np.random.default_rng(0).normal(size=(2, 2000))
    assert epsilon_bound(draws[0], draws[1], delta=DELTA).epsilon == 0
    assert epsilon_bound(np.ones(10), np.ones(10), delta=DELTA).epsilon == 0


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_the_bound_on_the_gaussian_mechanism_holds_and_says_something(noise: float) -> None:
    """It may be wrong once in a thousand: twenty audits of each noise are not.

    On average it is at least half of what the expected counts of the best test would give.
    """
    exact = gaussian_epsilon(noise, DELTA)
    cuts = np.linspace(-10, 10, 401)
    hits, alarms = (np.floor(1000 * stats.norm.sf(cuts, mean, noise)) for mean in (1, 0))
    ideal = float(epsilon_from_counts(hits, 1000, alarms, 1000, delta=DELTA).max())
    bounds = []
    for seed in range(20):
        draws = noise * np.random.default_rng(seed).normal(size=(2, 2000))
        bounds.append(epsilon_bound(1 + draws[0], draws[1], delta=DELTA).epsilon)
    assert max(bounds) <= exact
    assert np.mean(bounds) > 0.5 * ideal > 0


def test_the_threshold_is_chosen_on_trials_that_the_bound_does_not_use() -> None:
    """Odd trials without information: nothing is found, however the even ones separate."""
    rng = np.random.default_rng(1)
    present, absent = rng.normal(size=(2, 1000))
    present[::2] += 100
    assert best_threshold(present[::2], absent[::2], delta=DELTA, confidence=0.999) > 5
    bound = epsilon_bound(present, absent, delta=DELTA)
    assert bound.epsilon == 0
    present[1::2] += 3
    absent[1::2] -= 3
    assert epsilon_bound(present, absent, delta=DELTA).threshold == bound.threshold


def test_the_gaussian_mechanism_in_closed_form() -> None:
    """Its delta at epsilon, by numerical integration of the two densities' excess."""
    for noise in (0.7, 1.0, 3.0):
        epsilon = gaussian_epsilon(noise, DELTA)
        x = np.linspace(-60, 60, 2_000_001)
        excess = stats.norm.pdf(x, 1, noise) - math.exp(epsilon) * stats.norm.pdf(x, 0, noise)
        assert float(np.maximum(excess, 0).sum() * (x[1] - x[0])) == pytest.approx(DELTA, rel=1e-3)
    assert gaussian_epsilon(2.0, DELTA, steps=4) == pytest.approx(gaussian_epsilon(1.0, DELTA))
    assert gaussian_epsilon(1e7, DELTA) == 0
    assert gaussian_epsilon(0.05, DELTA) > 200


@pytest.mark.parametrize(
    ("present", "absent"), [([1.0], [0.0, 0.0]), ([1.0, math.nan], [0.0, 0.0])]
)
def test_too_few_or_broken_trials_are_refused(present: list[float], absent: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more finite statistics"):
        epsilon_bound(present, absent, delta=DELTA)


def test_counts_outside_the_trials_are_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and n >= 1, got 4.* of 3"):
        clopper_pearson(4, 3, 0.1)

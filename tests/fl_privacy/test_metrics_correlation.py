"""Correlations against SciPy, and that p and interval keep what they promise."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fl_privacy.metrics.correlation import Kind, correlate

KINDS: tuple[Kind, ...] = ("pearson", "spearman")
SCIPY: dict[Kind, Any] = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}


def drawn(n: int, slope: float, seed: int) -> tuple[list[float], list[float]]:
    random = np.random.default_rng(seed)
    x = random.normal(size=n)
    return x.tolist(), (slope * x + random.normal(size=n)).tolist()


def test_coefficients_are_those_of_scipy() -> None:
    x, y = drawn(30, 0.7, 0)
    y[3], x[5] = y[4], x[6]  # ties
    pearson, spearman = (correlate(x, y, kind=kind) for kind in KINDS)
    assert pearson.interval.mean == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman.interval.mean == pytest.approx(stats.spearmanr(x, y).statistic)
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert (pearson.interval.low, pearson.interval.high) == pytest.approx((low, high))
    assert pearson.interval.n == spearman.interval.n == 30
    assert spearman.interval.low < low  # ranks vary more


@pytest.mark.parametrize("kind", KINDS)
def test_p_of_few_pairs_counts_every_shuffle(kind: Kind) -> None:
    x, y = drawn(6, 1.0, 1)

    def statistic(z: np.ndarray) -> float:
        return abs(float(SCIPY[kind](z, y).statistic))

    every = stats.permutation_test(
        (np.asarray(x),), statistic, permutation_type="pairings", alternative="greater"
    )
    assert correlate(x, y, kind=kind).p == pytest.approx(every.pvalue)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_shuffles_come_near_the_t_test(kind: Kind) -> None:
    x, y = drawn(40, 0.35, 2)
    found = correlate(x, y, kind=kind, seed=3)
    assert found.p == pytest.approx(float(SCIPY[kind](x, y).pvalue), abs=0.02)
    assert found == correlate(x, y, kind=kind, seed=3)


def test_a_difference_between_groups_is_no_relation_inside_them() -> None:
    random = np.random.default_rng(4)
    groups = np.repeat(np.arange(8), 6)
    x = 10.0 * groups + random.normal(size=48)
    y = 10.0 * groups + random.normal(size=48)
    pooled = correlate(x.tolist(), y.tolist(), kind="pearson")
    kept = correlate(x.tolist(), y.tolist(), kind="pearson", groups=groups.tolist())
    assert pooled.interval.mean == kept.interval.mean > 0.99
    assert pooled.p < 0.001
    assert kept.p > 0.05
    assert kept.groups == 8


def test_an_interval_over_groups_takes_copies_for_no_more_than_one() -> None:
    x, y = drawn(12, 0.5, 5)
    twice = [v for v in x for _ in range(9)], [v for v in y for _ in range(9)]
    groups = [i for i in range(12) for _ in range(9)]
    alone = correlate(x, y, kind="pearson").interval
    naive = correlate(*twice, kind="pearson").interval
    kept = correlate(*twice, kind="pearson", groups=groups).interval
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)
    assert kept.high - kept.low > 0.6 * (alone.high - alone.low)


def test_nothing_is_said_of_too_few_or_constant_numbers() -> None:
    for x, y in (([1.0, 2], [3.0, 4]), ([1.0, 1, 1, 1], [1.0, 2, 3, 4])):
        for kind in KINDS:
            found = correlate(x, y, kind=kind)
            assert math.isnan(found.interval.mean)
            assert math.isnan(found.p)
    three = correlate([1.0, 2, 3], [1.0, 2, 4], kind="spearman")
    assert three.interval.mean == pytest.approx(1)
    assert math.isnan(three.interval.low)
    assert three.p == pytest.approx(2 / 6)  # the order and its reverse, of six


def test_numbers_that_are_none_are_left_out() -> None:
    x, y = drawn(10, 1.0, 6)
    more = correlate([*x, math.nan, 1.0], [*y, 1.0, math.inf], kind="pearson", groups=[0] * 12)
    assert more.interval == correlate(x, y, kind="pearson").interval
    with pytest.raises(ValueError, match="as many"):
        correlate(x, y[:-1], kind="pearson")

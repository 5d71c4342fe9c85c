"""Correlations against SciPy, and that p and interval keep what they promise."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fl_privacy.metrics.correlation import Correlation, Kind, Profile, correlate

KINDS: tuple[Kind, ...] = ("pearson", "spearman")
SCIPY: dict[Kind, Any] = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}


def profile(
    x: Sequence[float], y: Sequence[float], *, run: object = 0, network: object = "net"
) -> Profile:
    names = [f"layer{i}" for i in range(len(x))]
    own = dict(zip(names, x, strict=True)), dict(zip(names, y, strict=True))
    return Profile(str(network), str(run), *own)


def drawn(n: int, slope: float, seed: int) -> tuple[list[float], list[float]]:
    random = np.random.default_rng(seed)
    x = random.normal(size=n)
    return x.tolist(), (slope * x + random.normal(size=n)).tolist()


def test_coefficients_of_one_profile_are_those_of_scipy() -> None:
    x, y = drawn(30, 0.7, 0)
    y[3], x[5] = y[4], x[6]  # ties
    pearson, spearman = (correlate([profile(x, y)], kind=kind) for kind in KINDS)
    assert pearson.interval.mean == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman.interval.mean == pytest.approx(stats.spearmanr(x, y).statistic)
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert (pearson.interval.low, pearson.interval.high) == pytest.approx((low, high))
    assert pearson.interval.n == spearman.interval.n == 30
    assert spearman.interval.low < low  # ranks vary more


@pytest.mark.parametrize("kind", KINDS)
def test_p_of_few_layers_counts_every_shuffle(kind: Kind) -> None:
    x, y = drawn(6, 1.0, 1)

    def statistic(z: np.ndarray) -> float:
        return abs(float(SCIPY[kind](z, y).statistic))

    every = stats.permutation_test(
        (np.asarray(x),), statistic, permutation_type="pairings", alternative="greater"
    )
    assert correlate([profile(x, y)], kind=kind).p == pytest.approx(every.pvalue)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_shuffles_come_near_the_t_test(kind: Kind) -> None:
    x, y = drawn(40, 0.35, 2)
    found = correlate([profile(x, y)], kind=kind, seed=3)
    assert found.p == pytest.approx(float(SCIPY[kind](x, y).pvalue), abs=0.02)
    assert found == correlate([profile(x, y)], kind=kind, seed=3)


def repeated(seed: int, repeats: int, noise: float, *, same_run: bool) -> Correlation:
    """Five layers whose x and y have nothing to do with each other, told again with noise."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=5), random.normal(size=5)

    def told(numbers: np.ndarray) -> list[float]:
        return [float(v) for v in numbers + noise * random.normal(size=5)]

    every = [profile(told(x), told(y), run=0 if same_run else k) for k in range(repeats)]
    return correlate(every, kind="pearson", seed=seed)


@pytest.mark.parametrize(
    ("repeats", "noise", "same_run"),
    [(5, 0.1, True), (20, 0.5, False)],
    ids=["five rounds of a run", "twenty runs"],
)
def test_layers_that_are_told_of_again_are_no_further_evidence(
    repeats: int, noise: float, same_run: bool
) -> None:
    found = [repeated(seed, repeats, noise, same_run=same_run) for seed in range(200)]
    assert np.mean([one.p < 0.05 for one in found]) < 0.1
    excluding = [one.interval.low > 0 or one.interval.high < 0 for one in found]
    assert np.mean(excluding) < 0.1
    assert {one.interval.n for one in found} == {5}
    assert {one.repeats.n for one in found} == {1 if same_run else repeats}


def test_p_of_one_network_is_no_smaller_than_its_orders_allow() -> None:
    perfect = [profile([1, 2, 3], [2, 4, 7], run=run) for run in range(20)]
    found = correlate(perfect, kind="spearman")
    assert found.interval.mean == pytest.approx(1)
    assert found.p == pytest.approx(2 / 6)  # the order and its reverse, of six
    assert math.isnan(found.interval.low)


def test_unrelated_layers_of_several_networks_are_shuffled_network_by_network() -> None:
    two = [profile([1, 2, 3], [1, 2, 3]), profile([1, 2, 3, 4], [1, 2, 3, 4], network="other")]
    found = correlate(two, kind="pearson")
    assert found.p == pytest.approx(2 / (6 * 24))  # both as they are, and both reversed
    assert (found.interval.n, found.networks) == (7, 2)


def test_a_difference_between_profiles_is_no_relation_inside_them() -> None:
    random = np.random.default_rng(4)
    every = [
        profile(*(10.0 * k + random.normal(size=(2, 6))).tolist(), run=k, network=k)
        for k in range(8)
    ]
    x, y = [v for p in every for v in p.x.values()], [v for p in every for v in p.y.values()]
    assert stats.pearsonr(x, y).statistic > 0.99
    found = correlate(every, kind="pearson")
    apart = [stats.pearsonr(list(p.x.values()), list(p.y.values())).statistic for p in every]
    assert found.interval.mean == pytest.approx(np.mean(apart))
    assert found.p > 0.05
    assert found.interval.low < 0 < found.interval.high


def test_an_interval_over_five_networks_or_more_takes_them_for_the_draws() -> None:
    apart = [drawn(9, 1.0, seed) for seed in range(6)]
    once = [profile(x, y, network=k) for k, (x, y) in enumerate(apart)]
    often = [
        profile(x, y, network=k, run=run) for k, (x, y) in enumerate(apart) for run in range(9)
    ]
    one, many = (correlate(every, kind="pearson") for every in (once, often))
    for found in (many.interval, one.repeats):
        bounds = one.interval.mean, one.interval.low, one.interval.high
        assert (found.mean, found.low, found.high) == pytest.approx(bounds)
    r = [stats.pearsonr(x, y).statistic for x, y in apart]
    low, _ = stats.t.interval(0.95, 5, loc=np.mean(r), scale=stats.sem(r))
    assert one.interval.low == pytest.approx(low)
    assert many.repeats.high - many.repeats.low < one.interval.high - one.interval.low


def test_an_interval_over_layers_counts_each_once() -> None:
    x, y = drawn(12, 0.5, 5)
    alone = correlate([profile(x, y)], kind="pearson")
    copies = correlate([profile(x, y, run=run) for run in range(9)], kind="pearson")
    assert copies.interval == alone.interval
    assert copies.p == alone.p
    assert (copies.repeats.low, copies.repeats.high) == pytest.approx((alone.interval.mean,) * 2)


def test_several_profiles_of_a_run_are_averaged_before_runs_are() -> None:
    up, down = ([1.0, 2, 3, 4], [1.0, 2, 3, 4]), ([1.0, 2, 3, 4], [4.0, 3, 2, 1])
    found = correlate(
        [profile(*up, run=0), profile(*up, run=0), profile(*down, run=1)], kind="pearson"
    )
    assert found.interval.mean == pytest.approx(0)
    assert found.repeats.n == 2
    assert (found.repeats.low, found.repeats.high) == (-1, 1)


def test_nothing_is_said_of_too_few_or_constant_numbers() -> None:
    for x, y in (([1.0, 2], [3.0, 4]), ([1.0, 1, 1, 1], [1.0, 2, 3, 4])):
        for kind in KINDS:
            found = correlate([profile(x, y)], kind=kind)
            assert math.isnan(found.interval.mean)
            assert math.isnan(found.p)
    told = profile([1.0, 2, 3], [1.0, 2, 4])
    beside = correlate([told, profile([1.0, 1, 1], [1.0, 2, 4], run=1)], kind="pearson")
    assert beside == correlate([told], kind="pearson")


def test_numbers_that_are_none_are_left_out() -> None:
    x, y = drawn(10, 1.0, 6)
    more = correlate([profile([*x, math.nan, 1.0], [*y, 1.0, math.inf])], kind="pearson")
    assert more.interval == correlate([profile(x, y)], kind="pearson").interval
    lacking = Profile("net", "1", dict.fromkeys("abc", 1.0), {"a": 1.0})
    assert math.isnan(correlate([lacking], kind="pearson").p)

"""Label overlap and intervals: closed forms, coverage, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_privacy.metrics.labels import LabelAccuracy, overlap
from fl_privacy.metrics.statistics import (
    Interval,
    mean_interval,
    quartiles,
    share_interval,
    wilson,
)
from fl_privacy.types import Outcome, Reconstruction, Samples

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(labels=LABELS, truth=LABELS)
def test_overlap_is_the_best_over_all_pairings(labels: list[int], truth: list[int]) -> None:
    counted = labels[: len(truth)]
    best = sum(min(counted.count(c), truth.count(c)) for c in range(5)) / len(truth)
    share = overlap(torch.tensor(labels), torch.tensor(truth))
    assert share == pytest.approx(best)
    assert 0 <= share <= 1


@given(data=st.data(), truth=LABELS)
def test_overlap_does_not_depend_on_order(data: st.DataObject, truth: list[int]) -> None:
    shuffled = data.draw(st.permutations(truth))
    assert overlap(torch.tensor(shuffled), torch.tensor(truth)) == 1


def test_label_accuracy_gives_one_value_a_result() -> None:
    def made(*labels: int) -> Reconstruction:
        inputs = torch.zeros(len(labels), 1, 2, 2)
        return Reconstruction("aa", inputs, torch.tensor(labels), Outcome("completed"))

    truth = Samples(torch.zeros(4, 1, 2, 2), torch.tensor([1, 1, 2, 3]))
    scores = LabelAccuracy().score([made(3, 1, 1, 2), made(1, 1, 1, 1)], [truth, truth])
    assert scores.tolist() == [1.0, 0.5]


def test_mean_interval_is_students_t() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    got = mean_interval(values)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (got.mean, got.n) == (4.0, 4)
    assert (got.low, got.high) == pytest.approx((want.low, want.high))


def test_mean_interval_covers_the_mean_95_times_in_100() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    hits = sum(i.low <= 3.0 <= i.high for i in map(mean_interval, draws.tolist()))
    assert hits / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert mean_interval([1.0, None, 3.0, math.nan, math.inf]) == mean_interval([1.0, 3.0])
    assert math.isnan(mean_interval([]).mean)
    one = mean_interval([2.0])
    assert (one.mean, one.n, math.isnan(one.low)) == (2.0, 1, True)


def test_quartiles_of_an_arithmetic_row() -> None:
    got = quartiles([4.0, 0.0, 3.0, 1.0, 2.0, None])
    assert (got.lower, got.median, got.upper) == (1.0, 2.0, 3.0)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_agrees_with_scipy_and_stays_between_0_and_1(n: int, share: float) -> None:
    k = round(share * n)
    got = wilson(k, n)
    want = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)
    assert 0 <= got.low <= got.mean <= got.high <= 1


def test_wilson_refuses_more_successes_than_trials() -> None:
    with pytest.raises(ValueError, match="between 0 and n = 3, got 4"):
        wilson(4, 3)
    assert math.isnan(wilson(0, 0).mean)


SHARES = st.lists(st.integers(0, 8).map(lambda k: k / 8), min_size=2, max_size=20)


@given(values=SHARES)
def test_the_interval_of_a_share_stays_between_0_and_1(values: list[float]) -> None:
    got = share_interval(values)
    assert 0 <= got.low <= got.mean + 1e-12
    assert got.mean - 1e-12 <= got.high <= 1
    assert got.low < got.high  # equal values are not certain either


@given(values=SHARES)
def test_a_share_and_its_complement_have_mirrored_intervals(values: list[float]) -> None:
    got, other = share_interval(values), share_interval([1 - v for v in values])
    assert (other.low, other.high) == pytest.approx((1 - got.high, 1 - got.low), abs=1e-6)


def test_zeros_and_ones_have_wilson_s_interval_and_one_value_has_none() -> None:
    assert share_interval([1.0, 0.0, 1.0, None]) == wilson(2, 3)
    assert share_interval([1.0] * 9) == wilson(9, 9)
    assert math.isnan(share_interval([0.5]).low)
    assert share_interval([]).n == 0


def test_many_values_far_from_the_edges_have_student_s_interval() -> None:
    values = np.random.default_rng(1).uniform(0.4, 0.6, 200).tolist()
    got, student = share_interval(values), mean_interval(values)
    width = student.high - student.low
    assert (got.low, got.high) == pytest.approx((student.low, student.high), abs=0.01 * width)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("batch", [4, 32])
def test_intervals_of_batches_cover_the_true_share(share: float, batch: int) -> None:
    """Twelve batches a repeat; the nominal 95 % within what approximations of this kind reach."""
    found = np.random.default_rng(2).binomial(batch, share, size=(2000, 12)) / batch
    hits = sum(i.low <= share <= i.high for i in map(share_interval, found.tolist()))
    assert hits / 2000 > 0.93


def test_equal_values_bound_how_often_another_may_differ() -> None:
    u = wilson(0, 8).high
    got = share_interval([0.25] * 8)
    assert (got.low, got.high) == pytest.approx((0.25 * (1 - u), 0.25 * (1 - u) + u))


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
@pytest.mark.parametrize("values", [[0.1, 0.4, 0.5, 0.9], [1.0, 1.0, 1.0], [0.25, 0.25]])
def test_repeated_values_of_a_group_tell_no_more_than_one(
    interval: Callable[..., Interval], values: list[float]
) -> None:
    once = interval(values)
    singles = interval([*values, None], [*range(len(values)), 99])
    assert (singles.low, singles.high) == pytest.approx((once.low, once.high))
    groups = [i for i in range(len(values)) for _ in range(7)]
    often = interval([v for v in values for _ in range(7)], groups)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.n == 7 * len(values)


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_intervals_cover_the_mean_where_values_of_a_group_are_alike(
    interval: Callable[..., Interval],
) -> None:
    """Twelve clients with eight targets each: taken as 96 draws they give too little."""
    draw = np.random.default_rng(3)
    clients = np.clip(draw.normal(0.5, 0.1, size=(1000, 12, 1)), 0, 1)
    values = np.clip(clients + draw.normal(0, 0.05, size=(1000, 12, 8)), 0, 1).reshape(1000, 96)
    groups = np.repeat(np.arange(12), 8).tolist()
    found = [(interval(v, groups), interval(v)) for v in values.tolist()]
    robust, naive = (
        sum(one.low <= 0.5 <= one.high for one in own) for own in zip(*found, strict=True)
    )
    assert robust > 930
    assert naive < 700


def test_few_groups_that_look_alike_by_chance_do_not_make_an_interval_narrow() -> None:
    values, groups = [0.0, 2.0, 0.0, 2.0], [1, 1, 2, 2]
    got, independent = mean_interval(values, groups), mean_interval(values)
    assert got.low < independent.low < 1 < independent.high < got.high


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a share lies in \[0, 1\]"):
        share_interval([0.5, 1.5])

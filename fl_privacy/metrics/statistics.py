"""Means and shares with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import stats

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]

LEVEL = 0.95
"""Coverage of every interval in this project."""

ALIKE = 1e-9
"""Shares that differ by less count as equal."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, over ``n`` values; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile (linear interpolation)."""

    lower: float
    median: float
    upper: float


def finite(values: Iterable[float | None]) -> Numbers:
    """The values that are numbers, ``[n]`` float64."""
    array = np.asarray([math.nan if v is None else v for v in values], dtype=np.float64)
    return array[np.isfinite(array)]


def totals(
    values: Iterable[float | None], groups: Iterable[Hashable] | None
) -> tuple[Numbers, Numbers]:
    """The values that are numbers, and for each of their groups the sum of the deviations.

    ``[n]`` and ``[groups]``, float64. Values of one group may depend on each other; without
    ``groups`` each is its own.
    """
    every = np.asarray([math.nan if v is None else v for v in values], dtype=np.float64)
    kept = np.isfinite(every)
    array = every[kept]
    if len(array) == 0 or groups is None:
        return array, array - array.mean() if len(array) else array
    numbers: dict[Hashable, int] = {}
    codes = np.asarray([numbers.setdefault(group, len(numbers)) for group in groups])[kept]
    _, codes = np.unique(codes, return_inverse=True)
    sums: Numbers = np.bincount(codes, weights=array - array.mean()).astype(np.float64)
    return array, sums


def variance_of_mean(array: Numbers, sums: Numbers) -> float:
    """Squared standard error of the mean of `totals`, robust to dependence inside groups.

    ``G / (G - 1) * sum_g (sum_i (x_gi - mean))^2 / n^2`` (Liang and Zeger, *Biometrika* 73, 1986,
    for a mean), which is ``s^2 / n`` where every group holds one value, and is never taken for
    less: few groups may look alike by chance.
    """
    robust = len(sums) / (len(sums) - 1) * np.square(sums).sum() / len(array) ** 2
    return float(max(robust, array.var(ddof=1) / len(array)))


def mean_interval(
    values: Iterable[float | None], groups: Iterable[Hashable] | None = None
) -> Interval:
    """Mean with a 95 % Student t interval over the values, whose ``groups`` are independent.

    Values that are None or not finite are left out; fewer than two groups give no interval.
    """
    array, sums = totals(values, groups)
    n = len(array)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(array.mean())
    if len(sums) == 1:
        return Interval(mean, math.nan, math.nan, n)
    quantile = stats.t.ppf((1 + LEVEL) / 2, len(sums) - 1)
    half = float(quantile * math.sqrt(variance_of_mean(array, sums)))
    return Interval(mean, mean - half, mean + half, n)


def quartiles(values: Iterable[float | None]) -> Quartiles:
    """Quartiles of the values that are numbers; NaN when there are none."""
    array = finite(values)
    if len(array) == 0:
        return Quartiles(math.nan, math.nan, math.nan)
    lower, median, upper = np.quantile(array, (0.25, 0.5, 0.75))
    return Quartiles(float(lower), float(median), float(upper))


def wilson(successes: float, n: int) -> Interval:
    """Share ``successes / n`` with its 95 % score interval (Wilson, 1927).

    Raises:
        ValueError: more successes than trials, or fewer than none.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n = {n}, got {successes}")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    share = successes / n
    return Interval(share, *score_bounds(share, n), n)


def score_bounds(share: float, n: float) -> tuple[float, float]:
    """Wilson's bounds of a share seen in ``n`` trials, which need not be a whole number."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def share_interval(
    values: Iterable[float | None], groups: Iterable[Hashable] | None = None
) -> Interval:
    """Mean of values in [0, 1] with a 95 % interval inside [0, 1]; a value is one target's share.

    Zeros and ones alone: `wilson`. Otherwise Wilson's bounds for the number of trials that
    would vary as much as the mean of the values does (Franco et al., *J. Survey Statistics
    and Methodology* 7, 2019), times ``(z / t)^2`` for the few values that is estimated from
    (Korn and Graubard, *Survey Methodology* 24, 1998). Values that are all equal to ``c``
    show no variance: another value then differs with a probability below Wilson's bound
    ``u`` of 0 out of n, so their mean lies in ``(1 - u) c + [0, u]``. With ``groups`` of
    several values the number of groups stands for n, and `variance_of_mean` for the variance.

    Raises:
        ValueError: a value outside [0, 1].
    """
    array, sums = totals(values, groups)
    n, independent = len(array), len(sums)
    if n and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(f"a share lies in [0, 1], got {array.min()} to {array.max()}")
    if n == independent and set(array.tolist()) <= {0.0, 1.0}:
        return wilson(float(array.sum()), n)
    mean = float(array.mean())
    alike = n > 0 and array.max() - array.min() < ALIKE
    if alike and mean in (0, 1):
        return Interval(mean, *score_bounds(mean, independent), n)
    if independent == 1:
        return Interval(mean, math.nan, math.nan, n)
    if alike:
        _, rest = score_bounds(0.0, independent)
        return Interval(mean, (1 - rest) * mean, (1 - rest) * mean + rest, n)
    squeeze = NormalDist().inv_cdf((1 + LEVEL) / 2) / stats.t.ppf((1 + LEVEL) / 2, independent - 1)
    trials = mean * (1 - mean) / variance_of_mean(array, sums) * squeeze**2
    return Interval(mean, *score_bounds(mean, trials), n)

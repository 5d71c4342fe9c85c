"""Means and shares with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import stats

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


def finite(values: Iterable[float | None]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The values that are numbers, ``[n]`` float64."""
    array = np.asarray([math.nan if v is None else v for v in values], dtype=np.float64)
    return array[np.isfinite(array)]


def mean_interval(values: Iterable[float | None]) -> Interval:
    """Mean with a 95 % Student t interval over the values, which are taken as independent.

    Values that are None or not finite are left out; fewer than two give no interval.
    """
    array = finite(values)
    n = len(array)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(array.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
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


def share_interval(values: Iterable[float | None]) -> Interval:
    """Mean of values in [0, 1] with a 95 % interval inside [0, 1]; a value is one target's share.

    Zeros and ones alone: `wilson`. Otherwise Wilson's bounds for the number of trials that
    would vary as much as the mean of the values does (Franco et al., *J. Survey Statistics
    and Methodology* 7, 2019), times ``(z / t)^2`` for the few values that is estimated from
    (Korn and Graubard, *Survey Methodology* 24, 1998). Values that are all equal to ``c``
    show no variance: another value then differs with a probability below Wilson's bound
    ``u`` of 0 out of n, so their mean lies in ``(1 - u) c + [0, u]``.

    Raises:
        ValueError: a value outside [0, 1].
    """
    array = finite(values)
    n = len(array)
    if n and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(f"a share lies in [0, 1], got {array.min()} to {array.max()}")
    if set(array.tolist()) <= {0.0, 1.0}:
        return wilson(float(array.sum()), n)
    mean = float(array.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    if array.max() - array.min() < ALIKE:
        _, rest = score_bounds(0.0, n)
        return Interval(mean, (1 - rest) * mean, (1 - rest) * mean + rest, n)
    squeeze = NormalDist().inv_cdf((1 + LEVEL) / 2) / stats.t.ppf((1 + LEVEL) / 2, n - 1)
    trials = float(mean * (1 - mean) * n / array.var(ddof=1) * squeeze**2)
    return Interval(mean, *score_bounds(mean, trials), n)

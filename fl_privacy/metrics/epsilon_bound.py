"""An empirical lower bound on epsilon, from how well a membership test tells two worlds apart.

Jagielski, Ullman, Oprea: Auditing Differentially Private Machine Learning, NeurIPS 2020,
https://arxiv.org/abs/2006.07709; Nasr et al.: Adversary Instantiation, S&P 2021,
https://arxiv.org/abs/2101.04535. Also here: the exact epsilon of the Gaussian
mechanism (Balle, Wang, ICML 2018, https://arxiv.org/abs/1805.06530, theorem 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

CONFIDENCE = 0.999
"""With this probability the bound holds, whatever the mechanism."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EpsilonBound:
    """A lower bound on epsilon at ``delta``, and the counts behind it.

    Of ``present`` trials with the canary ``true_positives`` were above ``threshold``, of
    ``absent`` ones without it ``false_positives``; none of them helped to choose the threshold.
    """

    epsilon: float
    delta: float
    confidence: float
    threshold: float
    true_positives: int
    present: int
    false_positives: int
    absent: int


def clopper_pearson(successes: ArrayLike, n: int, alpha: float) -> tuple[Floats, Floats]:
    """One-sided lower and upper bounds of a share, each wrong with probability ``alpha`` at most.

    ``successes`` may be an array. Clopper, Pearson, Biometrika 26, 1934.

    Raises:
        ValueError: no trials, or a count outside 0 to ``n``.
    """
    k = np.asarray(successes, dtype=np.float64)
    if n < 1 or np.any((k < 0) | (k > n)):
        raise ValueError(f"expected counts between 0 and n >= 1, got {k} of {n}")
    with np.errstate(invalid="ignore"):
        low = np.where(k > 0, stats.beta.ppf(alpha, k, n - k + 1), 0.0)
        high = np.where(k < n, stats.beta.ppf(1 - alpha, k + 1, n - k), 1.0)
    return low, high


def epsilon_from_counts(
    true_positives: ArrayLike,
    present: int,
    false_positives: ArrayLike,
    absent: int,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
) -> Floats:
    """The lower bound on epsilon that the counts of one fixed test give, 0 or more.

    Differential privacy bounds every test, and its complement: P(positive | present) <=
    e^epsilon P(positive | absent) + delta, P(negative | absent) <= e^epsilon P(negative |
    present) + delta. Both follow from a lower bound on the true and an upper bound on the false
    positive rate, each one-sided at half of 1 - ``confidence`` (Bonferroni over the two).
    """
    alpha = (1 - confidence) / 2
    hit, _ = clopper_pearson(true_positives, present, alpha)
    _, alarm = clopper_pearson(false_positives, absent, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        positive = np.log(np.maximum(hit - delta, 0.0) / alarm)
        negative = np.log(np.maximum(1 - alarm - delta, 0.0) / (1 - hit))
    return np.maximum(np.maximum(positive, negative), 0.0)


def epsilon_bound(
    present: ArrayLike, absent: ArrayLike, *, delta: float, confidence: float = CONFIDENCE
) -> EpsilonBound:
    """The bound from statistics ``[trials]`` that are larger where the canary is present.

    The threshold is the best one for the even trials; the bound comes from the odd ones, which
    had no part in that choice. Trials have to be independent of each other.

    Raises:
        ValueError: fewer than two trials in a world, or statistics that are not finite.
    """
    here, gone = (np.asarray(values, dtype=np.float64) for values in (present, absent))
    if min(len(here), len(gone)) < 2 or not np.all(np.isfinite([here.sum(), gone.sum()])):
        raise ValueError(
            f"expected two or more finite statistics in each world, got {len(here)} with the "
            f"canary and {len(gone)} without"
        )
    threshold = best_threshold(here[::2], gone[::2], delta=delta, confidence=confidence)
    tested_here, tested_gone = here[1::2], gone[1::2]
    hits, alarms = int((tested_here > threshold).sum()), int((tested_gone > threshold).sum())
    n, m = len(tested_here), len(tested_gone)
    bound = epsilon_from_counts(hits, n, alarms, m, delta=delta, confidence=confidence)
    return EpsilonBound(float(bound), delta, confidence, threshold, hits, n, alarms, m)


def best_threshold(present: Floats, absent: Floats, *, delta: float, confidence: float) -> float:
    """The threshold with the largest bound on these trials, among the middles between them."""
    values = np.unique(np.concatenate([present, absent]))
    cuts = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    hits = len(present) - np.searchsorted(np.sort(present), cuts, side="right")
    alarms = len(absent) - np.searchsorted(np.sort(absent), cuts, side="right")
    bounds = epsilon_from_counts(
        hits, len(present), alarms, len(absent), delta=delta, confidence=confidence
    )
    best = np.flatnonzero(bounds == bounds.max())
    return float(cuts[best[len(best) // 2]])


def gaussian_epsilon(noise_multiplier: float, delta: float, *, steps: int = 1) -> float:
    """The exact epsilon at ``delta`` of ``steps`` Gaussian mechanisms without subsampling.

    They are one with noise ``noise_multiplier / sqrt(steps)``; theorem 8 of Balle and Wang is
    solved for epsilon.
    """
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        kept = math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
        return float(stats.norm.cdf(mu / 2 - epsilon / mu)) - kept - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, mu * mu / 2 + mu * 40, xtol=1e-12))

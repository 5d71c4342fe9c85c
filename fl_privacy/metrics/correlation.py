"""Whether one number predicts another: Pearson's and Spearman's correlation, with p and interval.

As Figs. 1 to 3 of Mo et al., Layer-wise Characterization of Latent Information Leakage in
Federated Learning, https://arxiv.org/abs/2010.08762, which correlate metrics with an attacker's
AUC over layers. Their p comes from a t distribution; ours from shuffling, since layers are few and
those of one network, property or repeat depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy import stats

from fl_privacy.metrics.statistics import LEVEL, Interval, Numbers

Kind = Literal["pearson", "spearman"]

SHUFFLES = 9999
"""Shuffles that p is taken from, at most; all there are where these are fewer."""

RESAMPLES = 2000
"""Draws of whole groups that an interval is taken from."""

FEWEST = 3
"""Pairs below which nothing is said."""

FEWEST_GROUPS = 5
"""Groups below which they are not drawn anew, and the interval takes pairs as independent."""


@dataclass(frozen=True)
class Correlation:
    """A correlation: ``interval.mean`` is the coefficient, over ``interval.n`` pairs.

    ``p`` is two-sided, of no relation inside any group; ``groups`` their number.
    """

    kind: Kind
    interval: Interval
    p: float
    groups: int


def correlate(
    x: Sequence[float],
    y: Sequence[float],
    *,
    kind: Kind,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Correlation:
    """Correlation of pairs, of which those that are no finite numbers are left out.

    p is the share of shuffles of ``y`` inside each group (all of them where they are no more than
    9,999, else that many draws by ``seed``, the pairs as they are among them) whose coefficient
    is at least as far from 0. The 95 % interval comes from 2,000 draws of whole groups where
    there are five or more; otherwise from Fisher's transformation, whose variance is ``1 /
    (n - 3)`` for Pearson and ``(1 + r^2 / 2) / (n - 3)`` for Spearman (Bonett and Wright,
    *Psychometrika* 65, 2000), which takes pairs as independent, needs four, and has no
    interval for a coefficient of 1 or -1.

    Args:
        x: ``[n]``, such as a metric of each layer.
        y: ``[n]``, such as the AUC there.
        kind: Pearson's, or Spearman's, which is that of the ranks.
        groups: ``[n]``, what a pair is of: pairs of one group may depend on each other.
        seed: of every draw.

    Raises:
        ValueError: ``x``, ``y`` and ``groups`` differ in length.
    """
    if not len(x) == len(y) == len(groups if groups is not None else x):
        raise ValueError(f"expected as many x as y and groups, got {len(x)} and {len(y)}")
    kept = np.isfinite(np.asarray(x, float)) & np.isfinite(np.asarray(y, float))
    left, right = np.asarray(x, float)[kept], np.asarray(y, float)[kept]
    names = list(groups) if groups is not None else [0] * len(kept)
    numbers: dict[Hashable, int] = {}
    own = np.asarray(
        [numbers.setdefault(g, len(numbers)) for g, k in zip(names, kept, strict=True) if k]
    )
    n = len(left)
    if n < FEWEST or np.ptp(left) == 0 or np.ptp(right) == 0:
        nothing = Interval(math.nan, math.nan, math.nan, n)
        return Correlation(kind, nothing, math.nan, len(numbers))
    coefficient = _coefficient(left, right[None], kind)[0]
    p = _p(left, right, own, kind, seed)
    low, high = _interval(left, right, own, kind, seed, float(coefficient))
    return Correlation(kind, Interval(float(coefficient), low, high, n), p, len(numbers))


def _coefficient(x: Numbers, y: np.ndarray, kind: Kind) -> Numbers:
    """The coefficient of ``x [n]`` with each row of ``y [rows, n]``; NaN for a constant."""
    if kind == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y, axis=1)
    a, b = x - x.mean(), y - y.mean(1, keepdims=True)
    size = np.sqrt(np.square(a).sum() * np.square(b).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Numbers = np.clip(b @ a / size, -1, 1)
    return found


def _p(x: Numbers, y: Numbers, own: np.ndarray, kind: Kind, seed: int) -> float:
    places = [np.flatnonzero(own == g) for g in np.unique(own)]
    few = math.prod(math.factorial(min(len(p), 20)) for p in places) <= SHUFFLES
    shuffles = _all(places, len(y)) if few else _drawn(places, len(y), seed)
    strength = np.abs(_coefficient(x, y[shuffles], kind))
    as_far = strength >= abs(_coefficient(x, y[None], kind)[0]) - 1e-12
    return float(as_far.mean())


def _all(places: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Every way to shuffle ``n`` places inside their groups, ``[ways, n]``."""
    ways = []
    for order in product(*(permutations(p.tolist()) for p in places)):
        way = np.empty(n, dtype=np.intp)
        way[np.concatenate(places)] = np.concatenate([np.asarray(o, dtype=np.intp) for o in order])
        ways.append(way)
    return np.stack(ways)


def _drawn(places: Sequence[np.ndarray], n: int, seed: int) -> np.ndarray:
    """As many random shuffles inside the groups, the first of which changes nothing."""
    random = np.random.default_rng(seed)
    ways = np.tile(np.arange(n), (SHUFFLES + 1, 1))
    for place in places:
        ways[1:, place] = random.permuted(ways[1:, place], axis=1)
    return ways


def _interval(
    x: Numbers, y: Numbers, own: np.ndarray, kind: Kind, seed: int, r: float
) -> tuple[float, float]:
    places = [np.flatnonzero(own == g) for g in np.unique(own)]
    if len(places) >= FEWEST_GROUPS:
        random = np.random.default_rng(seed)
        picks = random.integers(len(places), size=(RESAMPLES, len(places)))
        drawn = [np.concatenate([places[i] for i in pick]) for pick in picks]
        found = [_coefficient(x[d], y[d][None], kind)[0] for d in drawn]
        low, high = np.nanquantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return float(low), float(high)
    n = len(x)
    if n <= 3 or abs(r) == 1:  # where the transformation is infinite
        return math.nan, math.nan
    spread = 1 + r * r / 2 if kind == "spearman" else 1.0
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(spread / (n - 3))
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)

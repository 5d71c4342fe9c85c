"""Whether one number of a layer predicts another: Pearson's and Spearman's correlation.

As Figs. 1 to 3 of Mo et al., Layer-wise Characterization of Latent Information Leakage in
Federated Learning, https://arxiv.org/abs/2010.08762, which correlate metrics with an attacker's
AUC over layers. Their p comes from a t distribution over all pairs. Here the units are the layers
of a network: rounds, attackers, properties and repeated runs tell of the same layers again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy import stats

from fl_privacy.metrics.statistics import LEVEL, Interval, Numbers, mean_interval

Kind = Literal["pearson", "spearman"]
Key = tuple[Hashable, Hashable]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

SHUFFLES = 9999
"""Shuffles that p is taken from, at most; all there are where these are fewer."""

FEWEST = 3
"""Layers below which nothing is said."""

FEWEST_NETWORKS = 5
"""Networks below which they are not taken as draws, and the interval is over their layers."""


@dataclass(frozen=True)
class Profile:
    """What one run told of the layers of a network: ``x`` and ``y`` of each, by name.

    One run may bring several, such as one for each property, attacker or round.
    """

    network: Hashable
    run: Hashable
    x: Mapping[str, float]
    y: Mapping[str, float]


@dataclass(frozen=True)
class Correlation:
    """A correlation over layers: ``interval.mean`` is the coefficient, ``interval.n`` the layers.

    ``p`` is two-sided, of no relation between layers. ``repeats`` is the mean over runs (its
    ``n``) with the interval of that: how well the coefficient of these same layers repeats, and
    no evidence for layers of other networks. ``networks`` is their number.
    """

    kind: Kind
    interval: Interval
    p: float
    repeats: Interval
    networks: int


@dataclass(frozen=True)
class _Standard:
    """A profile whose ``x [n]`` and ``y [n]`` have mean 0 and length 1, so that ``x @ y`` is r."""

    network: Hashable
    run: Hashable
    layers: tuple[str, ...]
    x: Numbers
    y: Numbers


def correlate(profiles: Sequence[Profile], *, kind: Kind, seed: int = 0) -> Correlation:
    """Mean correlation over layers: of each profile, then over those of a run, then over runs.

    Differences between profiles, such as of scale, have no part in it. Layers where ``x`` or
    ``y`` is no finite number are left out, and so is a profile with fewer than three layers or
    whose ``x`` or ``y`` does not vary.

    p is the share of shuffles of ``y`` over layers (all where they are no more than 9,999, else
    that many draws by ``seed``, the layers as they are among them) whose coefficient is at least
    as far from 0. The layers of a network are shuffled alike in all its profiles, so one network
    of L layers has no p below 1 / L!, however often it was run.

    The 95 % interval takes networks for the draws where there are five or more (Student's t over
    runs, those of one network dependent). Otherwise it is Fisher's over the different layers, each
    taken as independent and counted once: of variance ``1 / (sum of (L - 1) - 2)`` for Pearson
    and ``1 + r^2 / 2`` times that for Spearman (Bonett and Wright, *Psychometrika* 65, 2000);
    there is none for a coefficient of 1 or -1, and of fewer than four layers.

    Args:
        profiles: such as a metric (x) and the AUC (y) of each layer.
        kind: Pearson's, or Spearman's, which is that of the ranks inside a profile.
        seed: of every draw.
    """
    told = [standard for one in profiles if (standard := _standardized(one, kind)) is not None]
    if not told:
        nothing = Interval(math.nan, math.nan, math.nan, 0)
        return Correlation(kind, nothing, math.nan, nothing, 0)
    runs = _by_run(told)
    crossed = _crossed(told)
    repeats = _bounded(mean_interval(runs.values()))
    layers = [len(matrix) for matrix in crossed.values()]
    if len(layers) >= FEWEST_NETWORKS:
        found = _bounded(mean_interval(runs.values(), [network for network, _ in runs]))
        low, high = found.low, found.high
    else:
        low, high = _fisher(repeats.mean, sum(layers) - len(layers) - 2, kind)
    interval = Interval(repeats.mean, low, high, sum(layers))
    p = _p(list(crossed.values()), np.random.default_rng(seed))
    return Correlation(kind, interval, p, repeats, len(layers))


def _standardized(profile: Profile, kind: Kind) -> _Standard | None:
    """A profile in units of its own; None where that has no correlation."""
    pairs = {n: (x, profile.y[n]) for n, x in profile.x.items() if n in profile.y}
    kept = {n: pair for n, pair in pairs.items() if all(map(math.isfinite, pair))}
    if len(kept) < FEWEST:
        return None
    both = np.asarray(list(kept.values()), dtype=np.float64).T
    if not np.ptp(both, axis=1).all():
        return None
    both = stats.rankdata(both, axis=1) if kind == "spearman" else both
    both = both - both.mean(1, keepdims=True)
    both = both / np.linalg.norm(both, axis=1, keepdims=True)
    return _Standard(profile.network, profile.run, tuple(kept), both[0], both[1])


def _by_run(told: Sequence[_Standard]) -> dict[Key, float]:
    """Network and run -> mean coefficient of its profiles."""
    found: dict[Key, list[float]] = {}
    for one in told:
        found.setdefault((one.network, one.run), []).append(float(np.clip(one.x @ one.y, -1, 1)))
    return {key: math.fsum(own) / len(own) for key, own in found.items()}


def _crossed(told: Sequence[_Standard]) -> dict[Hashable, Matrix]:
    """Network -> ``[layers, layers]``: mean product of x at a layer (row) and y at another.

    Weighted so that the coefficient is the sum of all diagonals, and that after the layers are
    shuffled the sum of what then stands there. A layer that a profile lacks has the mean, 0.
    """
    counts = Counter((one.network, one.run) for one in told)
    layers: dict[Hashable, dict[str, int]] = {}
    for one in told:
        own = layers.setdefault(one.network, {})
        for name in one.layers:
            own.setdefault(name, len(own))
    found: dict[Hashable, Matrix] = {n: np.zeros((len(own),) * 2) for n, own in layers.items()}
    for one in told:
        places = [layers[one.network][name] for name in one.layers]
        weight = 1 / (len(counts) * counts[one.network, one.run])
        found[one.network][np.ix_(places, places)] += weight * np.outer(one.x, one.y)
    return found


def _p(crossed: Sequence[Matrix], random: np.random.Generator) -> float:
    """Share of shuffles whose coefficient is as far from 0 as that of the layers as they are."""
    few = math.prod(math.factorial(min(len(matrix), 20)) for matrix in crossed) <= SHUFFLES
    found = np.zeros(1)
    for matrix in crossed:
        ways = _all(len(matrix)) if few else _drawn(len(matrix), random)
        own = matrix[np.arange(len(matrix)), ways].sum(1)
        found = (found[:, None] + own).ravel() if few else found + own
    return float((np.abs(found) >= abs(found[0]) - 1e-12).mean())


def _all(n: int) -> np.ndarray:
    """Every order of ``n`` layers ``[orders, n]``, as they are first."""
    return np.asarray(list(permutations(range(n))), dtype=np.intp)


def _drawn(n: int, random: np.random.Generator) -> np.ndarray:
    """As many random orders, as they are first."""
    ways = np.tile(np.arange(n), (SHUFFLES + 1, 1))
    ways[1:] = random.permuted(ways[1:], axis=1)
    return ways


def _fisher(r: float, freedom: int, kind: Kind) -> tuple[float, float]:
    """Ends of Fisher's interval, whose variance is one over ``freedom``."""
    if freedom < 1 or abs(r) > 1 - 1e-12:  # where the transformation is infinite
        return math.nan, math.nan
    spread = 1 + r * r / 2 if kind == "spearman" else 1.0
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(spread / freedom)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _bounded(found: Interval) -> Interval:
    """An interval of a coefficient, which lies in [-1, 1]."""
    low, high = (
        min(1.0, max(-1.0, end)) if math.isfinite(end) else end for end in (found.low, found.high)
    )
    return Interval(found.mean, low, high, found.n)

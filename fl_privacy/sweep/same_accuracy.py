"""The error of one defense over that of another where both leave the same accuracy.

Each defense is a curve of (accuracy, error) through its strengths, from the undefended point
on, which is where every strength of zero begins. Between two points accuracy and the
logarithm of the error are interpolated linearly. Where a curve passes an accuracy more than
once its largest error counts, which favors that curve's defense.

A ratio has the interval of a parametric bootstrap: every accuracy and every error of the two
curves is drawn around its mean, as widely as its own 95 % interval says, and the middle 95 % of
the ratios count. Points share test images and targets, which makes differences surer than
independent draws do, so the interval errs to the wide side.

Where chance decides whether a curve passes an accuracy at all, as where no defense costs any that
can be measured, its points are compared instead: of those whose accuracy cannot be told from the
reference's, the one with the largest error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

import numpy as np

from fl_privacy.metrics.statistics import LEVEL, Interval
from fl_privacy.sweep.results import Adversary, Attacked, Measured

Knot = tuple[float, float]
"""Accuracy (a share) and error (above 0)."""

DRAWS = 1000
"""Draws behind an interval of a ratio."""

WIDTH = 2 * NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class Dot:
    """What is known of a strength: its accuracy (a share) and its error, with their intervals."""

    strength: str
    accuracy: Interval
    error: Interval

    @property
    def knot(self) -> Knot:
        """The means."""
        return self.accuracy.mean, self.error.mean

    def drawn(self, rng: np.random.Generator) -> list[Knot]:
        """What might have been measured, `DRAWS` times: errors log-normal, so above 0."""
        share, error = self.accuracy, self.error
        shares = rng.normal(share.mean, (share.high - share.low) / WIDTH, DRAWS)
        spread = (error.high - error.low) / WIDTH / error.mean
        errors = error.mean * np.exp(rng.normal(0.0, spread, DRAWS))
        return list(zip(shares.tolist(), errors.tolist(), strict=True))


@dataclass(frozen=True)
class Crossing:
    """The error of a curve at an accuracy; None where it is always above or below that."""

    error: float | None
    side: Literal["", "above", "below", "empty"] = ""


@dataclass(frozen=True)
class Beside:
    """The reference over that point of a rival which is as accurate as far as can be told.

    Of several the one with the largest error, which favors the rival.
    """

    strength: str
    error: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """The reference at one strength over a rival at the same accuracy.

    ``low`` and ``high`` bound the ratio; NaN where a measurement without an interval has a part.
    ``told`` is false where chance decides whether the rival ever has that accuracy; ``beside``
    is known there if a point of it has, as far as can be told.
    """

    strength: str
    accuracy: float
    error: float
    rival: str
    crossing: Crossing
    low: float = math.nan
    high: float = math.nan
    told: bool = True
    beside: Beside | None = None

    @property
    def ratio(self) -> float | None:
        """Above 1: the reference keeps more from this adversary; None where it cannot be told."""
        if self.crossing.error is None or not self.told:
            return None
        return self.error / self.crossing.error


def error_at(knots: Sequence[Knot], accuracy: float) -> Crossing:
    """The largest error that the curve through ``knots`` has at ``accuracy``."""
    if not knots:
        return Crossing(None, "empty")
    found = [error for share, error in knots if math.isclose(share, accuracy, abs_tol=1e-12)]
    for (a, low), (b, high) in pairwise(knots):
        if (a - accuracy) * (b - accuracy) < 0:
            part = (accuracy - a) / (b - a)
            found.append(math.exp((1 - part) * math.log(low) + part * math.log(high)))
    if found:
        return Crossing(max(found))
    return Crossing(None, "above" if min(share for share, _ in knots) > accuracy else "below")


def ratios(
    found: Sequence[Measured],
    reference: str,
    title: str,
    choose: Callable[[Attacked], Adversary],
) -> list[Ratio]:
    """Each strength of ``reference`` over each other defense, by one adversary of an attack."""
    curves = {
        name: dots([m for m in found if m.point.defense == name], title, choose)
        for name in dict.fromkeys(m.point.defense for m in found if m.point.spec)
    }
    start = dots([m for m in found if not m.point.spec], title, choose)[:1]
    return [
        ratio_of(own, rival, [*start, *curve])
        for rival, curve in curves.items()
        if rival != reference
        for own in curves.get(reference, [])
    ]


def ratio_of(own: Dot, rival: str, curve: Sequence[Dot]) -> Ratio:
    """The error of a strength over that of a rival's curve, with its interval.

    It can be told where at least 95 % of the draws agree on whether the rival has that accuracy.
    """
    crossing = error_at([dot.knot for dot in curve], own.accuracy.mean)
    measured = Ratio(own.strength, *own.knot, rival, crossing)
    if not all(math.isfinite(i.low) for d in (own, *curve) for i in (d.accuracy, d.error)):
        return measured
    rng = np.random.default_rng(0)
    drawn = zip(own.drawn(rng), *(dot.drawn(rng) for dot in curve), strict=True)
    passed = [(error, error_at(knots, share).error) for (share, error), *knots in drawn]
    made = [error / other for error, other in passed if other is not None]
    agree = len(made) if crossing.error is not None else DRAWS - len(made)
    if agree < LEVEL * DRAWS:
        return replace(measured, told=False, beside=beside(own, curve))
    if crossing.error is None:
        return measured
    low, high = middle(made)
    return replace(measured, low=low, high=high)


def beside(own: Dot, curve: Sequence[Dot]) -> Beside | None:
    """A strength over the point of a rival's curve that is as accurate; None where none is."""
    alike = [dot for dot in curve if as_accurate(own.accuracy, dot.accuracy)]
    if not alike:
        return None
    rival = max(alike, key=lambda dot: dot.error.mean)
    rng = np.random.default_rng(0)
    errors, others = ([error for _, error in dot.drawn(rng)] for dot in (own, rival))
    low, high = middle([error / other for error, other in zip(errors, others, strict=True)])
    ratio = own.error.mean / rival.error.mean
    return Beside(rival.strength, rival.error.mean, ratio, low, high)


def middle(drawn: Sequence[float]) -> tuple[float, float]:
    """The bounds of the middle 95 % of what was drawn."""
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return low, high


def as_accurate(one: Interval, other: Interval) -> bool:
    """Whether chance alone may be why two accuracies differ: within 1.96 standard errors."""
    bound = math.hypot((one.high - one.low) / 2, (other.high - other.low) / 2)
    return abs(one.mean - other.mean) <= bound


def dots(
    found: Sequence[Measured], title: str, choose: Callable[[Attacked], Adversary]
) -> list[Dot]:
    """Strength, accuracy and mean squared error of each point that has both."""
    result = []
    for measured in found:
        attacked, accuracy = measured.attacked(title), measured.accuracy
        error = choose(attacked).interval("mse") if attacked else None
        if accuracy is not None and error is not None and error.mean > 0:
            result.append(Dot(measured.point.strength, accuracy, error))
    return result


def plain(attacked: Attacked) -> Adversary:
    """The adversary that knows no defense."""
    return attacked.plain


def strongest(attacked: Attacked) -> Adversary:
    """The strongest of all, by its mean over targets."""
    return attacked.strongest

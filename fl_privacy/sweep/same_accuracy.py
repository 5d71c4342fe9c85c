"""The error of one defense over that of another where both leave the same accuracy.

Each defense is a curve of (accuracy, error) through its strengths, from the undefended point
on, which is where every strength of zero begins. Between two points accuracy and the
logarithm of the error are interpolated linearly. Where a curve passes an accuracy more than
once its largest error counts, which favors that curve's defense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fl_privacy.sweep.results import Adversary, Attacked, Measured

Knot = tuple[float, float]
"""Accuracy (a share) and error (above 0)."""


@dataclass(frozen=True)
class Crossing:
    """The error of a curve at an accuracy; None where it is always above or below that."""

    error: float | None
    side: Literal["", "above", "below", "empty"] = ""


@dataclass(frozen=True)
class Ratio:
    """The reference at one strength over a rival at the same accuracy."""

    strength: str
    accuracy: float
    error: float
    rival: str
    crossing: Crossing

    @property
    def ratio(self) -> float | None:
        """Above 1: the reference keeps more from this adversary; None without a crossing."""
        return None if self.crossing.error is None else self.error / self.crossing.error


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
        name: knots([m for m in found if m.point.defense == name], title, choose)
        for name in dict.fromkeys(m.point.defense for m in found if m.point.spec)
    }
    start = [knot for _, knot in knots([m for m in found if not m.point.spec], title, choose)][:1]
    return [
        Ratio(
            strength, accuracy, error, rival, error_at([*start, *(k for _, k in curve)], accuracy)
        )
        for rival, curve in curves.items()
        if rival != reference
        for strength, (accuracy, error) in curves.get(reference, [])
    ]


def knots(
    found: Sequence[Measured], title: str, choose: Callable[[Attacked], Adversary]
) -> list[tuple[str, Knot]]:
    """Strength, accuracy and mean squared error of each point that has both."""
    result = []
    for measured in found:
        attacked, accuracy = measured.attacked(title), measured.accuracy
        if attacked is None or accuracy is None:
            continue
        error = choose(attacked).interval("mse")
        if error is not None and error.mean > 0:
            result.append((measured.point.strength, (accuracy.mean, error.mean)))
    return result


def plain(attacked: Attacked) -> Adversary:
    """The adversary that knows no defense."""
    return attacked.plain


def strongest(attacked: Attacked) -> Adversary:
    """The strongest of all, by its mean over targets."""
    return attacked.strongest

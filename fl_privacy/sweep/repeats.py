"""What repeated runs say together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from fl_privacy.metrics.statistics import Interval, mean_interval


def over_repeats(values: Iterable[float], *, share: bool) -> Interval:
    """Mean over runs with its 95 % Student t interval, cut at 0 and 1 for a ``share``.

    One run has no interval, and values that are not finite are left out.
    """
    found = mean_interval(values)
    if not share or not math.isfinite(found.low):
        return found
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))

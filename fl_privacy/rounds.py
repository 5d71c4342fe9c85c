"""Which rounds a text such as ``1-5,10,20-`` means."""

from __future__ import annotations

import math
from collections.abc import Callable


class RoundsError(ValueError):
    """A text that names no rounds."""


def parse_rounds(spec: str) -> Callable[[int], bool]:
    """Whether a round is among those of ``spec``; an empty text means all.

    Raises:
        RoundsError: the text is not of that form.
    """
    if not spec:
        return lambda round: True
    ranges: list[tuple[int, float]] = []
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise RoundsError(f"expected rounds such as 1-5,10 or 20-, got {spec!r}")
        end = math.inf if dash and not last else int(last or first)
        if end < int(first):
            raise RoundsError(f"expected ascending rounds, got {part.strip()!r} in {spec!r}")
        ranges.append((int(first), end))
    return lambda round: any(first <= round <= last for first, last in ranges)

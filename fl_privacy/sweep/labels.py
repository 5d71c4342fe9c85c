"""Labels beside the points of a figure: where there is room, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

SIZE = 6.5
"""Of the letters, in points; one is about 0.6 of that wide."""

SIDES = ((5, 4), (5, -4), (-5, 4), (-5, -4))
"""Where a label may stand beside its point, in points of paper; the first that is free counts."""


@dataclass(frozen=True)
class Label:
    """Words for the point ``x``, ``y`` of the data."""

    words: str
    x: float
    y: float
    color: str


def place(axes: Axes, labels: Sequence[Label], dots: Sequence[tuple[float, float]]) -> None:
    """Write ``labels`` so that none lies on another or on one of the ``dots``.

    One for which no side is free is left out. The limits of ``axes`` must be final.
    """
    scale = 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    at = [scale * axes.transData.transform(dot) for dot in dots]
    taken = [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in at]
    for label in labels:
        x, y = scale * axes.transData.transform((label.x, label.y))
        width = 0.6 * SIZE * len(label.words)
        for right, up in SIDES:
            left = x + right if right > 0 else x + right - width
            box = Bbox.from_bounds(left, y + up - (0 if up > 0 else SIZE), width, SIZE)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                axes.annotate(
                    label.words,
                    (label.x, label.y),
                    xytext=(right, up),
                    textcoords="offset points",
                    ha="left" if right > 0 else "right",
                    va="bottom" if up > 0 else "top",
                    fontsize=SIZE,
                    color=label.color,
                )
                break

"""Signals as small inline SVG: truth and reconstruction as lines on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from markupsafe import Markup, escape
from torch import Tensor

MOST = 500
"""Bins of a line: of a longer signal each bin shows its smallest and its largest value."""
BAND, GAP = 100, 10


@dataclass(frozen=True)
class Line:
    """A signal ``[channels, length]`` in [0, 1] and the style-sheet color of its line."""

    signal: Tensor
    color: str
    behind: bool = False


def is_signal(shape: Sequence[int]) -> bool:
    """Whether inputs of this shape can be drawn as lines."""
    return len(shape) == 2 and shape[1] > 1


def drawing(lines: Sequence[Line], what: str) -> Markup:
    """The lines as one ``<svg>``: a band for each channel, each from 0 (bottom) to 1 (top).

    ``what`` describes it for screen readers.
    """
    channels = len(lines[0].signal)
    height = channels * (BAND + GAP) - GAP
    paths = Markup().join(
        _path(line, channel) for channel in range(channels) for line in reversed(lines)
    )
    return Markup(
        '<svg class="signal" viewBox="0 0 300 {}" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(height, escape(what), paths)


def _path(line: Line, channel: int) -> Markup:
    positions, values = outline(line.signal[channel])
    top = channel * (BAND + GAP)
    heights = top + BAND * (1 - values.nan_to_num(nan=0.5).clamp(0, 1))
    places = zip((300 * positions).tolist(), heights.tolist(), strict=True)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return Markup('<polyline points="{}" style="stroke: var(--{})"{}/>').format(
        points, line.color, Markup(' class="behind"') if line.behind else ""
    )


def outline(signal: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in [0, 1] and values of a line through ``signal [length]``, peaks kept."""
    values = signal.detach().float().cpu()
    length = len(values)
    positions = torch.linspace(0, 1, length)
    if length <= 2 * MOST:
        return positions, values
    ends = [(length * i) // MOST for i in range(MOST + 1)]
    kept: list[int] = []
    for start, end in pairwise(ends):
        part = values[start:end]
        kept += sorted({start + int(part.argmin()), start + int(part.argmax())})
    return positions[kept], values[kept]

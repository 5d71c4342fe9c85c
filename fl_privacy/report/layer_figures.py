"""A bar for each layer: what an attacker achieves, and what the metrics predict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fl_privacy.report.figures import ATTACK, GUESS, INK, STYLE, svg

ACROSS = 3
"""Panels beside each other at most."""


@dataclass(frozen=True)
class Bars:
    """One panel: a value for each layer, NaN where there is none; ``from_`` is where bars begin.

    ``arms`` are the ends of each value's interval, NaN where there is none; ``null`` what
    chance gives, one number a layer or nothing. ``attacked``: achieved by an attacker.
    """

    title: str
    unit: str
    values: Sequence[float]
    arms: Sequence[tuple[float, float]]
    null: Sequence[float] = ()
    attacked: bool = False
    from_: float = 0.0


def merged(lists: Iterable[Sequence[str]]) -> list[str]:
    """All layers that several ``lists`` name, each once, in the order of the longest first."""
    return list(dict.fromkeys(layer for own in sorted(lists, key=len)[::-1] for layer in own))


def layer_figure(layers: Sequence[str], panels: Sequence[Bars], name: str, what: str) -> Markup:
    """A panel a quantity, a bar a layer, the first layer of the forward pass on top."""
    across = min(ACROSS, len(panels))
    rows = math.ceil(len(panels) / across)
    height = 0.75 + 0.19 * len(layers)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.3 + 1.75 * across, rows * height), layout="constrained")
        grid = figure.subplots(rows, across, sharey=True, squeeze=False)
        for axes, panel in zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            _bars(axes, layers, panel)
        grid[0][0].set_ylim(len(layers) - 0.4, -0.6)
        return svg(figure, name, what)


def _bars(axes: Axes, layers: Sequence[str], panel: Bars) -> None:
    color = ATTACK if panel.attacked else GUESS
    places = range(len(layers))
    for y, value, (low, high) in zip(places, panel.values, panel.arms, strict=True):
        if not math.isfinite(value):
            continue
        axes.barh(y, value - panel.from_, left=panel.from_, height=0.62, color=color)
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
    for y, value in zip(places, panel.null, strict=False):
        if math.isfinite(value):
            axes.plot([value, value], [y - 0.42, y + 0.42], color=INK, linewidth=1, linestyle=":")
    axes.set_title("\n".join(wrap(panel.title, 24)), loc="left", fontsize=8, fontweight="bold")
    axes.set_xlabel("\n".join(wrap(panel.unit, 26)))
    axes.set_yticks(list(places), [_short(layer) for layer in layers])
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)


def _short(layer: str) -> str:
    return layer if len(layer) <= 22 else f"…{layer[-21:]}"

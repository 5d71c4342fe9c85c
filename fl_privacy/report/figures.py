"""Figures as inline SVG that follows the page's light or dark colors."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import wrap
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fl_privacy.metrics.statistics import Interval

INK, QUIET, ATTACK, GUESS = "#010101", "#020202", "#030303", "#040404"
COLORS = {INK: "var(--ink)", QUIET: "var(--line)", ATTACK: "var(--attack)", GUESS: "var(--guess)"}
"""Stand-ins matplotlib draws with, and the style-sheet colors that take their place."""

STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fl-privacy",
    "text.parse_math": False,
    "font.size": 8,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": QUIET,
}


@dataclass(frozen=True)
class Spread:
    """The values of one adversary in one group, for `spread_figure`."""

    label: str
    values: Sequence[float]
    interval: Interval
    is_baseline: bool


def spread_figure(groups: Sequence[tuple[str, Sequence[Spread]]], unit: str, what: str) -> Markup:
    """One dot a target, mean and 95 % interval of each adversary, group under group."""
    lines = sum(len(spreads) + 1 for _, spreads in groups)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9, 0.7 + 0.27 * lines), layout="constrained")
        axes = figure.add_subplot()
        ticks: dict[float, str] = {}
        y = 0.0
        for title, spreads in groups:
            at_left = axes.get_yaxis_transform()
            axes.text(0, y, _short(title), transform=at_left, fontweight="bold", va="center")
            for spread in spreads:
                y += 1
                ticks[y] = _folded(spread.label)
                _spread(axes, spread, y)
            y += 1.25
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_ylim(-0.6, y - 0.65)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(unit)
        return svg(figure, "spread", what)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _folded(text: str, width: int = 28) -> str:
    """On two lines at most, which a row has room for."""
    lines = wrap(text, width)
    return "\n".join([*lines[:1], _short(" ".join(lines[1:]), width)]).rstrip()


def _spread(axes: Axes, spread: Spread, y: float) -> None:
    color = GUESS if spread.is_baseline else ATTACK
    offsets = [y + 0.22 * ((i * 0.618034) % 1 - 0.5) * 2 for i in range(len(spread.values))]
    axes.scatter(spread.values, offsets, s=13, color=color, alpha=0.45, linewidths=0)
    if spread.interval.n > 1:
        axes.plot([spread.interval.low, spread.interval.high], [y, y], color=INK, linewidth=2)
    if spread.interval.n:
        axes.plot([spread.interval.mean], [y], "D", color=INK, markersize=4)


@dataclass(frozen=True)
class Curve:
    """Test accuracy after each round of one attempt, for `accuracy_figure`."""

    label: str
    rounds: list[int]
    shares: list[Interval]


def accuracy_figure(curves: Sequence[Curve], what: str) -> Markup:
    """Test accuracy after each round with its 95 % Wilson interval, attempt by attempt."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for curve, line in zip(curves, cycle(("o-", "s--", "^:", "D-.")), strict=False):
            low, mean, high = (
                [100 * getattr(s, part) for s in curve.shares] for part in ("low", "mean", "high")
            )
            axes.fill_between(curve.rounds, low, high, color=ATTACK, alpha=0.2, linewidth=0)
            axes.plot(curve.rounds, mean, line, color=ATTACK, markersize=4, label=curve.label)
        if len(curves) > 1:
            axes.legend(frameon=False)
        axes.set_xlabel("round")
        axes.set_ylabel("test accuracy, %")
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.6)
        return svg(figure, "accuracy", what)


def svg(figure: Figure, name: str, what: str) -> Markup:
    """A figure as an ``<svg>`` element: scalable, described for screen readers, own ids."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for stand_in, color in COLORS.items():
        text = text.replace(stand_in, color)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{escape(what)}" class="figure"'
    links = ' xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(re.sub(r"<svg[^>]*", lambda _: head + links, text, count=1))

"""The utility-privacy figure: accuracy against what an adversary's reconstructions miss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from fl_privacy.metrics.statistics import Interval
from fl_privacy.report.figures import GUESS, STYLE, svg
from fl_privacy.sweep import same_accuracy
from fl_privacy.sweep.labels import Label, place
from fl_privacy.sweep.paper import colored, palette
from fl_privacy.sweep.results import Adversary, Attacked, Measured

FEW_DECADES = 50.0
"""Below this ratio of the ends a logarithmic axis is marked at 1, 2 and 5."""

Choose = Callable[[Attacked], Adversary]


def utility_figure(
    found: Sequence[Measured], title: str, names: Sequence[str], what: str, key: str
) -> Markup | None:
    """Accuracy against error: a panel for the plain adversary, one for the strongest.

    A line a defense through its strengths; crosses are 95 % intervals, an arrow one that reaches
    zero, the ring is the undefended point, the dotted line the error of a blind guess. None
    without both numbers.
    """
    panels: list[tuple[str, Choose]] = [("plain adversary", same_accuracy.plain)]
    if any(len(a.adversaries) > 1 for m in found if (a := m.attacked(title))):
        panels.append(("strongest adversary", same_accuracy.strongest))
    if not same_accuracy.dots(found, title, same_accuracy.plain):
        return None
    styles = palette(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6 if len(panels) > 1 else 5.2, 3.7), layout="constrained")
        (row,) = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
        lines = [_lines(found, title, choose, styles) for _, choose in panels]
        for axes, (name, _), drawn in zip(row, panels, lines, strict=True):
            _utility(axes, found, title, drawn, styles)
            axes.set_title(name, loc="left", fontsize=8, fontweight="bold")
            _scale(axes)
        row[0].set_ylabel("test accuracy, %")
        for axes in row:
            axes.set_xlabel("mean squared error, pixel range² (right: sees less)")
        handles = _handles(found, title, styles)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False
        )
        figure.draw_without_rendering()  # so that the layout, and with it every place, is final
        for axes, drawn in zip(row, lines, strict=True):
            _finish(axes, drawn, styles)
        return colored(svg(figure, key, what))


def _utility(
    axes: Axes,
    found: Sequence[Measured],
    title: str,
    lines: Lines,
    styles: dict[str, tuple[str, str]],
) -> None:
    for name, dots in lines:
        _line(axes, dots, *styles[name], hollow=not dots[0][0])
    guesses = [g.mean for m in found if (a := m.attacked(title)) and (g := _guess(a))]
    if guesses:
        axes.axvline(sum(guesses) / len(guesses), color=GUESS, linestyle=":", linewidth=1.2)


def _scale(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = high < FEW_DECADES * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.12)


def _finish(axes: Axes, lines: Lines, styles: dict[str, tuple[str, str]]) -> None:
    """What needs the limits of the axes: labels, and intervals that reach zero."""
    places = [(error.mean, 100 * share.mean) for _, dots in lines for _, error, share in dots]
    labels = []
    for name, dots in lines:
        color = styles[name][0]
        for _, error, share in dots:
            if error.low <= 0:
                _to_the_edge(axes, error.mean, 100 * share.mean, color)
        ends = [dots[0], *dots[1:][-1:]] if dots[0][0] else []
        labels += [Label(words, e.mean, 100 * a.mean, color) for words, e, a in ends]
    place(axes, labels, places)


def _to_the_edge(axes: Axes, x: float, y: float, color: str) -> None:
    """An arm whose end, at zero or below, a logarithmic axis does not have: it points there."""
    limits = axes.get_xlim()
    axes.plot([limits[0], x], [y, y], color=color, linewidth=0.8, alpha=0.55)
    edge = axes.get_yaxis_transform()
    axes.plot([0.0], [y], "<", color=color, markersize=4, transform=edge, clip_on=False)
    axes.set_xlim(limits)


def _lines(found: Sequence[Measured], title: str, choose: Choose, names: Iterable[str]) -> Lines:
    """The points of each defense that has some."""
    lines = [
        (name, [d for m in found if m.point.defense == name and (d := _dot(m, title, choose))])
        for name in names
    ]
    return [(name, dots) for name, dots in lines if dots]


Dot = tuple[str, Interval, Interval]
"""Strength, error and accuracy of a point; the strength is empty for a defense without any."""

Lines = list[tuple[str, list[Dot]]]
"""Each defense with its points."""


def _dot(measured: Measured, title: str, choose: Choose) -> Dot | None:
    attacked, accuracy = measured.attacked(title), measured.accuracy
    error = choose(attacked).interval("mse") if attacked else None
    if accuracy is None or error is None or error.mean <= 0:
        return None
    return measured.point.strength, error, accuracy


def _guess(attacked: Attacked) -> Interval | None:
    return attacked.guess.interval("mse") if attacked.guess else None


def _strengths(found: Sequence[Measured], name: str) -> bool:
    return any(m.point.strength for m in found if m.point.defense == name)


def _line(axes: Axes, dots: Sequence[Dot], color: str, marker: str, *, hollow: bool) -> None:
    x, y = [error.mean for _, error, _ in dots], [100 * share.mean for _, _, share in dots]
    arms: dict[str, Any] = {"fmt": "none", "ecolor": color, "elinewidth": 0.8, "alpha": 0.55}
    axes.errorbar(x, y, xerr=_arms([e for _, e, _ in dots], 1, above=0.0), **arms)
    axes.errorbar(x, y, yerr=_arms([s for _, _, s in dots], 100), **arms)
    face = "none" if hollow else color
    size = 8 if hollow else 4
    axes.plot(
        x, y, marker=marker, color=color, markerfacecolor=face, markersize=size, linewidth=1.3
    )


def _arms(
    intervals: Sequence[Interval], scale: float, above: float | None = None
) -> list[list[float]]:
    """Lengths below and above the means; none below where it would not end ``above`` that."""
    lows, highs = [], []
    for value in intervals:
        low, high = (value.low, value.high) if value.low == value.low else (value.mean,) * 2
        if above is not None:
            low = low if low > above else value.mean
        lows.append(scale * (value.mean - low))
        highs.append(scale * (high - value.mean))
    return [lows, highs]


def _handles(
    found: Sequence[Measured], title: str, styles: dict[str, tuple[str, str]]
) -> list[Line2D]:
    present = {m.point.defense for m in found if m.attacked(title)}
    handles = [
        Line2D(
            [], [], color=color, marker=marker, markersize=5, label=name, linewidth=1.3,
            markerfacecolor=color if _strengths(found, name) else "none",
        )
        for name, (color, marker) in styles.items()
        if name in present
    ]  # fmt: skip
    if any((a := m.attacked(title)) and a.guess for m in found):
        handles.append(Line2D([], [], color=GUESS, linestyle=":", label="blind guess"))
    return handles

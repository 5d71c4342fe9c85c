"""The utility-privacy figure: accuracy against what an adversary's reconstructions miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from fl_privacy.sweep.paper import colored, palette
from fl_privacy.sweep.results import Adversary, Attacked, Measured

FEW_DECADES = 50.0
"""Below this ratio of the ends a logarithmic axis is marked at 1, 2 and 5."""

Choose = Callable[[Attacked], Adversary]


def utility_figure(
    found: Sequence[Measured], title: str, names: Sequence[str], what: str, key: str
) -> Markup | None:
    """Accuracy against error: a panel for the plain adversary, one for the strongest.

    A line a defense through its strengths; crosses are 95 % intervals, the ring is the
    undefended point, the dotted line the error of a blind guess. None without both numbers.
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
        for axes, (name, choose) in zip(row, panels, strict=True):
            _utility(axes, found, title, choose, styles)
            axes.set_title(name, loc="left", fontsize=8, fontweight="bold")
        row[0].set_ylabel("test accuracy, %")
        for axes in row:
            axes.set_xlabel("mean squared error, pixel range² (right leaks less)")
        handles = _handles(found, title, styles)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False
        )
        return colored(svg(figure, key, what))


def _utility(
    axes: Axes,
    found: Sequence[Measured],
    title: str,
    choose: Choose,
    styles: dict[str, tuple[str, str]],
) -> None:
    for name, (color, marker) in styles.items():
        dots = [dot for m in found if m.point.defense == name and (dot := _dot(m, title, choose))]
        if dots:
            _line(axes, dots, color, marker, hollow=not _strengths(found, name))
    guesses = [g.mean for m in found if (a := m.attacked(title)) and (g := _guess(a))]
    if guesses:
        axes.axvline(sum(guesses) / len(guesses), color=GUESS, linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = high < FEW_DECADES * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.12)


Dot = tuple[str, Interval, Interval]


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
    for strength, error, share in {dots[0], dots[-1]} if not hollow else ():
        axes.annotate(
            strength,
            (error.mean, 100 * share.mean),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=6.5,
            color=color,
        )


def _arms(
    intervals: Sequence[Interval], scale: float, above: float | None = None
) -> list[list[float]]:
    """Lengths below and above the means; on a logarithmic axis no arm reaches ``above``."""
    lows, highs = [], []
    for value in intervals:
        low, high = (value.low, value.high) if value.low == value.low else (value.mean,) * 2
        if above is not None:
            low = max(low, above + value.mean / 20)
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

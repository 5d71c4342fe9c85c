"""The utility-privacy figure, and the curves of training.

Figures are drawn once, in the colors of the page, and once more as files of their own, in
which the light colors take the place of the style sheet's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fl_privacy.metrics.statistics import Interval
from fl_privacy.report.figures import GUESS, INK, STYLE, svg
from fl_privacy.sweep import same_accuracy
from fl_privacy.sweep.results import Adversary, Attacked, Measured

SERIES = tuple(f"#0501{i:02d}" for i in range(8))
"""Stand-ins matplotlib draws with; the style sheet's ``--series-<i>`` take their place."""

LIGHT = ("#b4420f", "#17694f", "#3a5fa8", "#8a3f8f", "#8a6d00", "#0f7f8c", "#a32d4e", "#4d5660")
DARK = ("#ff9a62", "#5fcba4", "#8fb1ff", "#e09be6", "#e0c04a", "#5fd3e0", "#ff92b0", "#b8c2cc")
"""Their values on light and on dark paper."""

PAPER: dict[str, str] = {
    "--ink": "#1c2024",
    "--line": "#dfe1e4",
    "--attack": "#b4420f",
    "--guess": "#6b7480",
    **{f"--series-{i}": color for i, color in enumerate(LIGHT)},
}
MARKERS = "osD^vPX*"
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")

Choose = Callable[[Attacked], Adversary]


def palette(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each defense, in the order of the file."""
    return dict(zip(names, zip(cycle(SERIES), cycle(MARKERS), strict=False), strict=False))


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
    if not same_accuracy.knots(found, title, same_accuracy.plain):
        return None
    styles = palette(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.7), layout="constrained")
        row = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (name, choose) in zip(row, panels, strict=False):
            _utility(axes, found, title, choose, styles)
            axes.set_title(name, loc="left", fontsize=8, fontweight="bold")
        if len(panels) == 1:
            row[1].set_axis_off()
        row[0].set_ylabel("test accuracy, %")
        for axes in row[: len(panels)]:
            axes.set_xlabel("mean squared error, squared pixel range (further right leaks less)")
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
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
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


def curves_figure(
    found: Sequence[Measured], names: Sequence[str], what: str, key: str
) -> Markup | None:
    """Test accuracy and loss by round, the mean over seeds; None when nothing was trained.

    A defense keeps its color; its strengths are told apart by their dashes.
    """
    trained = [m for m in found if m.curves]
    if not trained:
        return None
    styles = palette(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        handles = []
        for measured in trained:
            same = [m for m in trained if m.point.defense == measured.point.defense]
            line = DASHES[same.index(measured) % len(DASHES)]
            color = styles[measured.point.defense][0]
            left.plot(
                _mean([[100 * a for a in c.accuracy] for c in measured.curves]), line, color=color
            )
            right.plot(_mean([c.loss for c in measured.curves]), line, color=color)
            handles.append(Line2D([], [], color=color, linestyle=line, label=measured.point.label))
        for axes, label in ((left, "test accuracy, %"), (right, "test loss, nats")):
            axes.set_xlabel("round")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(linewidth=0.6)
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        return colored(svg(figure, key, what))


def _mean(series: Sequence[Sequence[float | None]]) -> list[float]:
    columns = zip(*series, strict=False)
    return [sum(float("nan") if v is None else v for v in c) / len(c) for c in columns]


def colored(figure: Markup) -> Markup:
    """The stand-ins of the series as colors of the style sheet."""
    text = str(figure)
    for i, stand_in in enumerate(SERIES):
        text = text.replace(stand_in, f"var(--series-{i})")
    return Markup(text)


def standalone(figure: Markup) -> str:
    """A figure of the page as a file of its own: plain colors on white paper."""
    text = str(figure)
    for name, color in PAPER.items():
        text = text.replace(f"var({name})", color)
    box = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert box is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[1]}pt" height="{box[2]}pt" '
    end = text.index(">") + 1
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    inside = text[end:]
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n{head}{text[len("<svg ") : end]}{paper}{inside}\n'
    )


def series_style() -> Markup:
    """The colors of the series as style-sheet rules, light and dark."""
    light = "".join(f"--series-{i}: {color};" for i, color in enumerate(LIGHT))
    dark = "".join(f"--series-{i}: {color};" for i, color in enumerate(DARK))
    return Markup(
        f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


__all__ = ["INK", "curves_figure", "series_style", "standalone", "utility_figure"]

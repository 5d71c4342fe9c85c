"""Figures of layers over repeated runs: bars, metric against AUC, and what an axis changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fl_privacy.metrics.statistics import Interval
from fl_privacy.prediction import Point
from fl_privacy.property_table import WHOLE
from fl_privacy.report.figures import GUESS, STYLE, svg
from fl_privacy.report.layer_figures import Bars, layer_figure, merged
from fl_privacy.report.words import plain
from fl_privacy.sweep.curves import DASHES
from fl_privacy.sweep.layer_study import NOTHING, Number, Quantity, Table
from fl_privacy.sweep.paper import MARKERS, SERIES, colored

ACROSS = 3
"""Panels beside each other at most."""


def layers_of(tables: Sequence[Table]) -> list[str]:
    """All layers, the whole update first, then in the order of the forward pass."""
    every = merged(list(layers) for table in tables for layers in table.values())
    return sorted(every, key=lambda layer: layer != WHOLE)


def shown(table: Table) -> list[Quantity]:
    """The quantities that have a panel: attackers and metrics, no columns."""
    return [quantity for quantity in table if not quantity.column]


def bars_figure(table: Table, titles: Mapping[str, str], what: str, key: str) -> Markup | None:
    """A panel an attacker or metric, a bar a layer; None where nothing is known."""
    quantities = shown(table)
    if not quantities:
        return None
    layers = layers_of([table])
    panels = [_bars(quantity, table[quantity], layers, titles) for quantity in quantities]
    return layer_figure(layers, panels, key, what)


def _bars(
    quantity: Quantity,
    numbers: Mapping[str, Number],
    layers: Sequence[str],
    titles: Mapping[str, str],
) -> Bars:
    nothing = Number(quantity, "", NOTHING, math.nan)
    held = [numbers.get(layer, nothing) for layer in layers]
    return Bars(
        title=plain(titles[quantity.title]),
        unit=quantity.unit,
        values=[number.value.mean for number in held],
        arms=[(number.value.low, number.value.high) for number in held],
        null=[number.null for number in held],
        attacked=quantity.attacked,
        from_=0.5 if quantity.attacked else 0.0,
    )


def scatter_figure(
    panels: Sequence[tuple[str, Mapping[str, Sequence[Point]]]], what: str, key: str
) -> Markup | None:
    """Each metric, spread over 0 to 1 in each repeat, against the AUC; a color a group of runs.

    A panel is a title and the points of each group; None without any.
    """
    if not panels:
        return None
    groups = list(dict.fromkeys(group for _, own in panels for group in own))
    across = min(ACROSS, len(panels))
    rows = math.ceil(len(panels) / across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.4 * across, 0.3 + 2.3 * rows), layout="constrained")
        grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        for axes, panel in zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            title, points = panel
            for i, group in enumerate(groups):
                own = points.get(group, ())
                axes.plot(
                    [p.value for p in own],
                    [p.auc for p in own],
                    linestyle="none",
                    marker=_marker(i),
                    color=SERIES[i % len(SERIES)],
                    markersize=3.2,
                    alpha=0.65,
                )
            axes.axhline(0.5, color=GUESS, linestyle=":", linewidth=1.2)
            _titled(axes, title, 30)
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
        _outer_labels(grid, len(panels), "metric, 0 to 1 over layers", "AUC of the layer alone")
        if len(groups) > 1:
            _legend(figure, groups, dotted="chance")
        return colored(svg(figure, key, what))


@dataclass(frozen=True)
class Line:
    """One series of an axis figure: an interval at each value of the axis, if there is one."""

    label: str
    values: Sequence[Interval]


@dataclass(frozen=True)
class AxisPanel:
    """One quantity along an axis; ``null``: what chance gets at each value."""

    title: str
    unit: str
    lines: Sequence[Line]
    null: Sequence[float] = ()


def axis_figure(
    ticks: Sequence[str], axis: str, panels: Sequence[AxisPanel], what: str, key: str
) -> Markup | None:
    """A panel a quantity, the values of an axis along it, a line a layer."""
    if not panels or len(ticks) < 2:
        return None
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    across = min(ACROSS, len(panels))
    rows = math.ceil(len(panels) / across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.5 * across, 0.3 + 2.2 * rows), layout="constrained")
        grid = figure.subplots(rows, across, squeeze=False)
        for axes, panel in zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            for number, line in enumerate(panel.lines):
                beside = 0.16 * (number / max(len(panel.lines) - 1, 1) - 0.5)
                _line(axes, line, labels.index(line.label), beside)
            if any(math.isfinite(value) for value in panel.null):
                axes.plot(panel.null, color=GUESS, linestyle=":", linewidth=1.4)
            _titled(axes, panel.title, 30)
            axes.set_ylabel("\n".join(wrap(panel.unit, 26)))
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlabel(axis)
            axes.margins(x=0.12)
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
        _legend(figure, labels, dotted="null, mean over layers", lines=True)
        return colored(svg(figure, key, what))


def _line(axes: Axes, line: Line, i: int, beside: float) -> None:
    """In the style of series ``i``, ``beside`` its place so that intervals hide no others."""
    color = SERIES[i % len(SERIES)]
    x = [place + beside for place in range(len(line.values))]
    axes.plot(
        x,
        [value.mean for value in line.values],
        color=color,
        linestyle=DASHES[i // len(SERIES) % len(DASHES)],
        marker=_marker(i),
        markersize=3.5,
        linewidth=1.2,
    )
    for place, value in zip(x, line.values, strict=True):
        if math.isfinite(value.low) and math.isfinite(value.high):
            axes.plot(
                [place, place], [value.low, value.high], color=color, linewidth=0.8, alpha=0.6
            )


def _titled(axes: Axes, title: str, width: int) -> None:
    axes.set_title("\n".join(wrap(title, width)), loc="left", fontsize=8, fontweight="bold")


def _outer_labels(grid: object, panels: int, x: str, y: str) -> None:
    rows = list(grid)  # type: ignore[call-overload]
    across = len(rows[0])
    for number in range(panels):
        row, column = divmod(number, across)
        if number + across >= panels:
            rows[row][column].set_xlabel(x)
            rows[row][column].tick_params(labelbottom=True)
        if not column:
            rows[row][column].set_ylabel(y)


def _legend(figure: Figure, labels: Sequence[str], *, dotted: str, lines: bool = False) -> None:
    """Below the panels, as many beside each other as fit; the figure grows by its lines."""
    handles = [
        Line2D(
            [], [], color=SERIES[i % len(SERIES)], marker=_marker(i), markersize=4,
            linestyle=DASHES[i // len(SERIES) % len(DASHES)] if lines else "none", linewidth=1.2,
            label=_short(label),
        )
        for i, label in enumerate(labels)
    ]  # fmt: skip
    handles.append(Line2D([], [], color=GUESS, linestyle=":", label=dotted))
    widest = max(len(_short(label)) for label in (*labels, dotted))
    room = int(figure.get_figwidth() * 72 / (4.5 * widest + 34))
    across = max(1, min(room, len(handles)))
    figure.set_figheight(figure.get_figheight() + 0.16 * math.ceil(len(handles) / across))
    figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False)


def _marker(i: int) -> str:
    """Another one where colors come again."""
    return MARKERS[(i + i // len(SERIES)) % len(MARKERS)]


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"

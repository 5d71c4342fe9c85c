"""Accuracy and loss of the global model, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fl_privacy.report.figures import STYLE, svg
from fl_privacy.sweep.paper import colored, palette
from fl_privacy.sweep.results import Measured

DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")

MOST_CURVES = 12
"""More than these cannot be told apart."""


def curves_figure(
    found: Sequence[Measured], names: Sequence[str], what: str, key: str
) -> Markup | None:
    """Test accuracy and loss by round, the mean over seeds; None when nothing was trained.

    A defense keeps its color; its strengths are told apart by their dashes. Of many points
    only the first and the last strength of each defense are drawn. The undefended one is dashed
    and drawn last, so that none of the others hides it.
    """
    trained = sorted(drawn(found), key=lambda m: not m.point.spec)
    if not trained:
        return None
    styles = palette(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        handles = []
        for measured in trained:
            same = [m for m in trained if m.point.defense == measured.point.defense]
            line = DASHES[same.index(measured) % len(DASHES)] if measured.point.spec else "--"
            color = styles[measured.point.defense][0]
            percent = [[100 * share for share in c.accuracy] for c in measured.curves]
            left.plot(_mean(percent), line, color=color)
            right.plot(_mean([c.loss for c in measured.curves]), line, color=color)
            handles.append(Line2D([], [], color=color, linestyle=line, label=measured.point.label))
        for axes, label in ((left, "test accuracy, %"), (right, "test loss, nats")):
            axes.set_xlabel("round")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(linewidth=0.6)
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        return colored(svg(figure, key, what))


def drawn(found: Sequence[Measured]) -> list[Measured]:
    """The points whose curves are drawn: all, or of many the ends of each defense."""
    trained = [m for m in found if m.curves]
    if len(trained) <= MOST_CURVES:
        return trained
    lines: dict[str, list[Measured]] = {}
    for measured in trained:
        lines.setdefault(measured.point.defense, []).append(measured)
    return [m for line in lines.values() for m in (line[:1] + line[1:][-1:])]


def _mean(series: Sequence[Sequence[float | None]]) -> list[float]:
    columns = zip(*series, strict=False)
    return [sum(float("nan") if v is None else v for v in c) / len(c) for c in columns]

"""The section of a sweep's page on layers, with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fl_privacy.prediction import Point, points
from fl_privacy.report.layer_tables import prediction_table
from fl_privacy.report.words import plain
from fl_privacy.sweep.grid import slug
from fl_privacy.sweep.layer_axes import panels, walks
from fl_privacy.sweep.layer_drawings import (
    axis_figure,
    bars_figure,
    scatter_figure,
    shown,
)
from fl_privacy.sweep.layer_runs import layer_runs
from fl_privacy.sweep.layer_study import Studied, normalized, short_titles
from fl_privacy.sweep.layer_table import (
    columns_tables,
    paper_peak,
    peak_lines,
    table,
)
from fl_privacy.sweep.paper import Picture
from fl_privacy.sweep.stages import Cell


def study(cells: Sequence[Cell]) -> list[Studied]:
    """The points of a sweep of which anything is known of layers.

    Raises:
        SweepError, ResultError, LayerResultError: a file is there and cannot be read.
    """
    grouped = [list(group) for _, group in groupby(cells, key=lambda cell: cell.point)]
    found = [
        Studied(own[0].point, str(own[0].record.parsed.model), tuple(layer_runs(own)))
        for own in grouped
        if own[0].record is not None
    ]
    return [one for one in found if one.runs]


def layers_section(found: Sequence[Studied]) -> tuple[Markup, list[Picture]]:
    """The section, and its figures; nothing where nothing is known of layers."""
    if not found:
        return Markup(), []
    titles = short_titles(quantity.title for one in found for quantity in one.table)
    bars = [(one, _bars(one, titles)) for one in found]
    along = _along(found, titles)
    pairs = {one.point.name: _points(one) for one in found}
    scatter = _scatter(found, pairs)
    every = [point for own in pairs.values() for point in own]
    template = files("fl_privacy.sweep").joinpath("layers.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = page.from_string(template).render(
        points=[_point(one, picture, titles) for one, picture in bars],
        along=along,
        scatter=scatter,
        predictions=_predictions(every) if every else [],
        repeats=max(len(one.runs) for one in found),
    )
    drawn = [picture for _, picture in bars if picture] + along + ([scatter] if scatter else [])
    return Markup(text), drawn  # escaped by the template


def _point(one: Studied, picture: Picture | None, titles: Mapping[str, str]) -> dict[str, Any]:
    return {
        "title": _name(one),
        "picture": picture,
        "repeats": len(one.runs),
        "seeds": ", ".join(str(run.seed) for run in one.runs),
        "table": table(one.table, shown(one.table), titles),
        "columns": columns_tables(one, titles),
        "peaks": peak_lines(one, titles),
        "paper": paper_peak(one.model),
        "model": one.model,
    }


def _name(one: Studied) -> str:
    words = [one.point.group, one.point.label]
    return " · ".join(word for word in words if word)


def _bars(one: Studied, titles: Mapping[str, str]) -> Picture | None:
    name = f"layers-{slug(one.point.name)}"
    what = f"A bar for each layer, {_name(one)}"
    drawing = bars_figure(one.table, titles, what, name)
    return None if drawing is None else Picture(name, _name(one), drawing)


def _along(found: Sequence[Studied], titles: Mapping[str, str]) -> list[Picture]:
    pictures = []
    for way in walks(found):
        caption = f"{way.axis}{f' ({way.fixed})' if way.fixed else ''}"
        name = "-".join(slug(part) for part in ("along", way.axis, way.fixed) if part)
        what = f"What {caption} changes, layer by layer"
        drawing = axis_figure(way.ticks, way.axis, panels(way, titles), what, name)
        if drawing is not None:
            pictures.append(Picture(name, f"Along {caption}", drawing))
    return pictures


def _points(one: Studied) -> list[Point]:
    """Every number of every metric beside the AUC at its layer, repeat by repeat."""
    return [
        point
        for run in one.runs
        for point in points(run.measured, run.aucs, run=f"{one.point.name} {run.seed}")
    ]


def _scatter(found: Sequence[Studied], pairs: Mapping[str, Sequence[Point]]) -> Picture | None:
    """Each metric, normalized over layers, against the AUC; a color a point of the sweep."""
    own = {one.point.name: normalized(pairs[one.point.name]) for one in found}
    metrics = list(dict.fromkeys(p.metric for each in own.values() for p in each if not p.column))
    titles, several = short_titles(metrics), len({one.point.label for one in found}) > 1
    panels = [
        (
            plain(titles[metric]),
            {
                _series(one, several): [
                    p for p in own[one.point.name] if (p.metric, p.column) == (metric, "")
                ]
                for one in found
            },
        )
        for metric in metrics
    ]
    what = "Metrics, normalized over layers in each repeat, against the attacker’s AUC"
    drawing = scatter_figure(panels, what, "layers-against-auc")
    return None if drawing is None else Picture("layers-against-auc", what, drawing)


def _series(one: Studied, several: bool) -> str:
    """A point in a legend: axes without names where their values speak, and its defense."""
    axes = [str(v) if isinstance(v, str) else f"{k} {v}" for k, v in one.point.axes]
    return ", ".join([*axes, *[one.point.label] * several]) or one.point.label


def _predictions(every: Sequence[Point]) -> list[dict[str, Any]]:
    """Correlations of metrics, then those of their other columns."""
    main = [point for point in every if not point.column]
    rest = [point for point in every if point.column]
    blocks = [("Metrics", False, main), ("Other columns", True, rest)]
    found = [
        {"title": title, "closed": closed, "lines": prediction_table(some)}
        for title, closed, some in blocks
    ]
    return [block for block in found if block["lines"]]

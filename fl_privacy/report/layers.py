"""The report's section on layers: what metrics measured of each, beside what an attacker got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fl_privacy.layer_results import Measurement, measurements
from fl_privacy.metrics.statistics import Interval
from fl_privacy.prediction import LayerAuc, points
from fl_privacy.protection import protections
from fl_privacy.report.layer_aucs import layer_aucs
from fl_privacy.report.layer_figures import Bars, layer_figure, merged
from fl_privacy.report.layer_tables import (
    auc_table,
    prediction_table,
    table,
)
from fl_privacy.report.layer_words import BOUNDS, rounds_in_words
from fl_privacy.report.protection_words import protection_table
from fl_privacy.report.scores import Analysis
from fl_privacy.report.words import plain

NULLS = ("null", "permuted labels, mean")
"""Columns that say what a layer without any information would get."""


def layers_section(run: Path, found: Sequence[Analysis]) -> Markup:
    """The section of a run folder; empty when nothing was measured or attacked layer by layer.

    Raises:
        LayerResultError, ProtectionError: a file is there and cannot be read.
    """
    measured, aucs, protected = measurements(run), layer_aucs(found), protections(run)
    if not measured and not aucs and not protected:
        return Markup()
    told = prediction_table(points(measured, aucs))
    others = [one for one in told if one["column"]]
    template = files("fl_privacy.report").joinpath("layers.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    shown = page.from_string(template).render(
        groups=groups_of(measured, aucs),
        aucs=[auc_table(one) for one in attacks_by_layer(aucs)],
        predictions=told,
        details=[("", [one for one in told if not one["column"]])]
        + [("Their other columns", others)] * bool(others),
        protections=[protection_table(one) for one in protected],
    )
    return Markup(shown)  # escaped by the template


def groups_of(found: Sequence[Measurement], aucs: Sequence[LayerAuc]) -> list[dict[str, Any]]:
    """Figure and tables of the measurements at the same global models."""
    rounds = list(dict.fromkeys(one.config.rounds for one in found)) or [()]
    return [
        group(f"layers{number}", [one for one in found if one.config.rounds == at], at, aucs)
        for number, at in enumerate(rounds, 1)
    ]


def group(
    key: str, found: Sequence[Measurement], at: Sequence[str], aucs: Sequence[LayerAuc]
) -> dict[str, Any]:
    """What was measured at one global model, or at several together, below what an attacker got."""
    title = f"Measured at the global model of {rounds_in_words(at)}" if at else "Attacked alone"
    lists = [[a.layer for a in own] for own in attacks_by_layer(aucs)] + [m.layers for m in found]
    layers = merged(lists)
    panels = [auc_bars(own, layers) for own in attacks_by_layer(aucs)]
    panels += [bars(one, layers) for one in found]
    what = f"{title}, a bar for each layer: {', '.join(panel.title for panel in panels)}"
    return {
        "title": title,
        "figure": layer_figure(layers, panels, key, what) if panels else "",
        "attacked": bool(aucs),
        "tables": [table(one) for one in found],
    }


def attacks_by_layer(aucs: Sequence[LayerAuc]) -> list[list[LayerAuc]]:
    """The AUC of each attack, about each property."""
    attacks = list(dict.fromkeys((a.attacker, a.property) for a in aucs))
    return [[a for a in aucs if (a.attacker, a.property) == one] for one in attacks]


def auc_bars(own: Sequence[LayerAuc], layers: Sequence[str]) -> Bars:
    """The panel of one attack, from chance on."""
    held = {a.layer: a.auc for a in own}
    nulls = {a.layer: a.null.mean for a in own if a.null}
    nothing = Interval(math.nan, math.nan, math.nan, 0)
    found = [held.get(layer, nothing) for layer in layers]
    about = f", {own[0].property}" if own[0].property else ""
    return Bars(
        title=f"attacker{about}",
        unit="AUC (0.5: chance)",
        values=[one.mean for one in found],
        arms=[(one.low, one.high) for one in found],
        null=[nulls.get(layer, math.nan) for layer in layers],
        attacked=True,
        from_=0.5,
    )


def bars(found: Measurement, layers: Sequence[str]) -> Bars:
    """The panel of one measurement, over ``layers``."""
    held = {layer: i for i, layer in enumerate(found.layers)}

    def at(numbers: Sequence[float]) -> list[float]:
        return [numbers[held[layer]] if layer in held else math.nan for layer in layers]

    low, high = intervals(found)
    title = plain(found.config.name) + (f", {found.config.about}" if found.config.about else "")
    null = next((found.columns[name] for name in NULLS if name in found.columns), ())
    return Bars(
        title=title,
        unit=found.unit,
        values=at(found.values),
        arms=list(zip(at(low), at(high), strict=True)),
        null=at(null) if null else (),
    )


def intervals(found: Measurement) -> tuple[Sequence[float], Sequence[float]]:
    """The ends of each value's interval: as given, or 1.96 standard errors away, or none."""
    if all(name in found.columns for name in BOUNDS):
        return found.columns["low"], found.columns["high"]
    errors = found.standard_errors or (math.nan,) * len(found.layers)
    pairs = list(zip(found.values, errors, strict=True))
    return [v - 1.96 * e for v, e in pairs], [v + 1.96 * e for v, e in pairs]

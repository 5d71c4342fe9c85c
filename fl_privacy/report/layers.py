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
from fl_privacy.report.layer_figures import Bars, layer_figure
from fl_privacy.report.layer_words import (
    BOUNDS,
    about,
    columns,
    heading,
    rounds_in_words,
)
from fl_privacy.report.words import plain


def layers_section(run: Path) -> Markup:
    """The section of a run folder; empty when nothing was measured.

    Raises:
        LayerResultError: a measurement is there and cannot be read.
    """
    found = measurements(run)
    if not found:
        return Markup()
    template = files("fl_privacy.report").joinpath("layers.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    shown = page.from_string(template).render(groups=groups_of(found))
    return Markup(shown)  # escaped by the template


def groups_of(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Figure and tables of the measurements at the same global models."""
    rounds = list(dict.fromkeys(one.config.rounds for one in found))
    return [
        group(f"layers{number}", [one for one in found if one.config.rounds == at], at)
        for number, at in enumerate(rounds, 1)
    ]


def group(key: str, found: Sequence[Measurement], at: Sequence[str]) -> dict[str, Any]:
    """What was measured at one global model, or at several together."""
    title = rounds_in_words(at).capitalize()
    layers = list(dict.fromkeys(layer for one in found for layer in one.layers))
    panels = [bars(one, layers) for one in found]
    what = f"{title}, a bar for each layer: {', '.join(panel.title for panel in panels)}"
    return {
        "title": title,
        "figure": layer_figure(layers, panels, key, what),
        "tables": [table(one) for one in found],
    }


def bars(found: Measurement, layers: Sequence[str]) -> Bars:
    """The panel of one measurement, over ``layers``."""
    held = {layer: i for i, layer in enumerate(found.layers)}

    def at(numbers: Sequence[float]) -> list[float]:
        return [numbers[held[layer]] if layer in held else math.nan for layer in layers]

    low, high = intervals(found)
    title = plain(found.config.name) + (f", {found.config.about}" if found.config.about else "")
    null = found.columns.get("null", ())
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


def table(found: Measurement) -> dict[str, Any]:
    """One measurement as text."""
    config = found.config
    settings = ", ".join(f"{plain(k)} {v!r}" for k, v in config.settings.items())
    return {
        "title": heading(found),
        "audit": config.source == "audit",
        "columns": columns(found),
        "layers": found.layers,
        "about": about(found),
        "settings": settings or "none",
        "digest": config.digest[:8],
        "code": config.code_digest[:8],
        "seconds": f"{found.seconds:,.1f}",
    }

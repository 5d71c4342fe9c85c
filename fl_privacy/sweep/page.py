"""A sweep as one self-contained HTML page, with its figures and numbers beside it as files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fl_privacy.component import VERSION
from fl_privacy.recording_store import write_atomically
from fl_privacy.report import words
from fl_privacy.report.page import style
from fl_privacy.sweep import same_accuracy
from fl_privacy.sweep.curves import curves_figure
from fl_privacy.sweep.figures import utility_figure
from fl_privacy.sweep.grid import Sweep, slug
from fl_privacy.sweep.layer_page import layers_section, study
from fl_privacy.sweep.layer_table import csv_text as layers_csv
from fl_privacy.sweep.paper import Picture, series_style, standalone
from fl_privacy.sweep.reading import SweepError
from fl_privacy.sweep.results import Adversary, Attacked, Measured
from fl_privacy.sweep.same_accuracy import Beside, Ratio
from fl_privacy.sweep.strip import strip_figure
from fl_privacy.sweep.table import (
    cost,
    csv_text,
    digits,
    leak_lines,
    metrics_of,
    said_of,
    undefended,
)

KNOWS: tuple[tuple[str, Callable[[Attacked], Adversary]], ...] = (
    ("plain", same_accuracy.plain),
    ("strongest", same_accuracy.strongest),
)


def write_page(
    out: Path,
    sweep: Sweep,
    found: Sequence[Measured],
    left: int,
    command: str,
    failed: Mapping[str, str],
) -> Path:
    """Write ``sweep.html``, ``sweep.csv`` and ``figures/*.svg`` into ``out``; returns the page.

    Also ``layers.csv`` where anything is known of layers.

    ``left`` is the number of steps that are not done, ``command`` what makes the rest, ``failed``
    what could not be done, with the reasons. The page shows clients' images, so only its owner
    may read it.

    Raises:
        SweepError: the folder cannot be written.
    """
    utility = {group: list(utilities(sweep, found, group)) for group in groups(found)}
    strips = {group: list(strips_of(sweep, found, group)) for group in groups(found)}
    studied = study([cell for measured in found for cell in measured.cells])
    layers, drawn = layers_section(studied)
    page = render(sweep, found, utility, strips, layers, left, command, failed)
    drawn += [p for pictures in (utility, strips) for group in pictures.values() for p in group]
    written = [(out / "sweep.html", page), (out / "sweep.csv", csv_text(found))]
    written += [(out / "layers.csv", layers_csv(studied))] if studied else []
    written += [(out / "figures" / f"{p.name}.svg", standalone(p.drawing)) for p in drawn]
    try:
        write_atomically([(path, text.encode()) for path, text in written])
    except OSError as error:
        raise SweepError(f"{out}: cannot be written ({error.strerror}); make room") from None
    return out / "sweep.html"


def render(
    sweep: Sweep,
    found: Sequence[Measured],
    utility: dict[str, list[Picture]],
    strips: dict[str, list[Picture]],
    layers: Markup,
    left: int,
    command: str,
    failed: Mapping[str, str],
) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["metric_name"] = words.metric_name
    environment.filters["digits"] = digits
    environment.filters["ratio"] = ratio_text
    template = files("fl_privacy.sweep").joinpath("sweep.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        sweep=sweep,
        title=sweep.title or "Defenses compared",
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=VERSION,
        style=style(),
        series=series_style(),
        left=left,
        command=command,
        failed=failed,
        points=len(found),
        layers=layers,
        reconstructs=any(a.reconstructs for measured in found for a in measured.attacks),
        groups=[
            {
                "title": group,
                "utility": utility[group],
                "strips": strips[group],
                "tried": [
                    tried
                    for attack in sweep.attacks
                    if attack.adaptive and (tried := adversaries(found, group, attack.title))
                ],
                "table": table(sweep, found, group),
                "ratios": [
                    section
                    for attack in sweep.attacks
                    if (section := ratio_section(sweep, found, group, attack.title))
                ],
            }
            for group in groups(found)
        ],
    )


def groups(found: Sequence[Measured]) -> list[str]:
    """The values of the axes, in the order of the sweep; one empty text without axes."""
    return list(dict.fromkeys(m.point.group for m in found))


def utilities(sweep: Sweep, found: Sequence[Measured], group: str) -> Iterator[Picture]:
    """Accuracy against error, attack by attack; then the curves of training."""
    mine, names = [m for m in found if m.point.group == group], list(sweep.defenses)
    for attack in sweep.attacks:
        name = _file("utility", group, attack.title)
        what = f"Test accuracy against the error of {attack.title}"
        drawing = utility_figure(mine, attack.title, names, what, name)
        if drawing is not None:
            yield Picture(name, f"Attack: {attack.title}", drawing)
    name = _file("training", group)
    drawing = curves_figure(mine, names, "Test accuracy and loss by round", name)
    if drawing is not None:
        yield Picture(name, "Training: test accuracy and loss by round, mean over seeds", drawing)


def strips_of(sweep: Sweep, found: Sequence[Measured], group: str) -> Iterator[Picture]:
    """The pictures of each defense through its strengths, the undefended ones on top."""
    free = undefended(found, group)
    for attack in sweep.attacks:
        for defense, line in sweep.defenses.items():
            mine = [m for m in found if (m.point.group, m.point.defense) == (group, defense)]
            if not line.spec or not mine:
                continue
            rows = [(m.point.strength or "defended", m) for m in mine]
            if free is not None:
                rows = [("undefended", free), *rows]
            if not any(a.reconstructs for _, m in rows if (a := m.attacked(attack.title))):
                continue
            name = _file("strip", group, attack.title, defense)
            what = f"Images and what {attack.title} made of them under {defense}"
            drawing = strip_figure(rows, attack.title, what, name)
            if drawing is not None:
                yield Picture(name, f"{defense}, attacked by {attack.title}", drawing)


def _file(*parts: str) -> str:
    return "-".join(slug(part) for part in parts if part)


def table(sweep: Sweep, found: Sequence[Measured], group: str) -> dict[str, Any]:
    """What each point costs and leaks."""
    free = undefended(found, group)
    mine = [m for m in found if m.point.group == group]
    metrics = metrics_of([a for m in mine for a in m.attacks])
    return {
        "metrics": metrics,
        "rows": [
            {
                "defense": m.point.defense,
                "strength": m.point.strength,
                "spec": m.point.spec,
                "seeds": len(m.seeds),
                "cost": cost(m, free),
                "reported": said_of(m),
                "leaks": leak_lines(m, metrics),
            }
            for m in mine
        ],
        "several": len(sweep.attacks) > 1,
        "columns": len(metrics) + 2 + (len(sweep.attacks) > 1),
        "trained": any(m.curves for m in mine),
    }


def adversaries(found: Sequence[Measured], group: str, attack: str) -> dict[str, Any] | None:
    """Which adversaries each defense met, among whom the strongest is; None where none did."""
    met: dict[str, dict[str, None]] = {}
    skipped: dict[str, dict[tuple[str, str], None]] = {}
    for measured in found:
        if measured.point.group == group and (attacked := measured.attacked(attack)):
            labels = met.setdefault(measured.point.defense, {})
            labels.update(dict.fromkeys(a.label for a in attacked.adversaries))
            left_out = skipped.setdefault(measured.point.defense, {})
            left_out.update(dict.fromkeys(attacked.skipped if measured.point.spec else ()))
    free = [
        name for name in met if any(not m.point.spec and m.point.defense == name for m in found)
    ]
    most = max((len(labels) for labels in met.values()), default=0)
    fewer = [name for name in free if len(met[name]) < most]
    lines = [
        {"defense": name, "labels": list(labels), "skipped": list(skipped[name])}
        for name, labels in met.items()
    ]
    return {"attack": attack, "lines": lines, "fewer": fewer, "most": most} if met else None


def ratio_section(
    sweep: Sweep, found: Sequence[Measured], group: str, attack: str
) -> dict[str, Any] | None:
    """The reference's error over the others' at the same accuracy; None without a reference."""
    mine = [m for m in found if m.point.group == group]
    columns = {
        name: same_accuracy.ratios(mine, sweep.reference, attack, choose)
        for name, choose in KNOWS
        if sweep.reference
    }
    if not columns.get("plain"):
        return None
    keys = [(r.strength, r.rival) for r in columns["plain"]]
    by_key = {name: {(r.strength, r.rival): r for r in rows} for name, rows in columns.items()}
    rows = [
        {"strength": s, "rival": r, "cells": [by_key[n].get((s, r)) for n, _ in KNOWS]}
        for s, r in keys
    ]
    best = [(name, largest(columns[name])) for name, _ in KNOWS]
    return {"attack": attack, "reference": sweep.reference, "rows": rows, "best": best}


def largest(found: Sequence[Ratio]) -> Ratio | None:
    """The greatest ratio of all."""
    known = [(r.ratio, i) for i, r in enumerate(found) if r.ratio is not None]
    return found[max(known)[1]] if known else None


def ratio_text(found: Ratio | Beside) -> str:
    """A ratio that can be told with its interval, two digits each: ``32 [4.1, 250]``."""
    values = (found.ratio or math.nan, found.low, found.high)
    said = [digits(float(f"{value:.1e}")) for value in values]
    return f"{said[0]} [{said[1]}, {said[2]}]" if math.isfinite(found.low) else said[0]

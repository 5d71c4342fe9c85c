"""Results to one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fl_privacy.component import VERSION
from fl_privacy.metrics.images import PSNR_CAP
from fl_privacy.metrics.statistics import wilson
from fl_privacy.property_rows import counted, scored
from fl_privacy.recording_store import write_atomically
from fl_privacy.report import words
from fl_privacy.report.figures import Curve, Spread, accuracy_figure, spread_figure
from fl_privacy.report.gallery import strips
from fl_privacy.report.headline import (
    PSNR,
    headlines,
    interrupted,
    weak_guesses,
    why_no_scores,
)
from fl_privacy.report.layers import layers_section
from fl_privacy.report.privacy import privacy_section
from fl_privacy.report.provenance import commands, provenance
from fl_privacy.report.reading import ReportError, Run, read_run
from fl_privacy.report.scores import (
    Analysis,
    Score,
    compared_with,
    defenses,
    endings,
    score,
    scored_values,
    scores,
)
from fl_privacy.results import MetricInfo
from fl_privacy.run_folder import RunFolder


def write_report(run: Path, *, pictures: int = 16) -> Path:
    """Write ``run/report.html``: one page that asks no other host for anything.

    It shows clients' images, so only its owner may read it.

    Args:
        run: run folder; needs a recording, shows whatever else is there.
        pictures: images shown of each defense group, the first by target key.

    Raises:
        RecordingError, ResultError, ReportError: something in the folder cannot be read, or the
            page cannot be written.
    """
    page = render(read_run(run), pictures=pictures)
    target = RunFolder(run).report
    try:
        write_atomically([(target, page.encode())])
    except OSError as error:
        raise ReportError(
            f"{target}: cannot be written ({error.strerror}); expected a run folder that is "
            f"writable and has room, copy the run to one"
        ) from None
    return target


def render(run: Run, *, pictures: int) -> str:
    """The page of a run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = words.plain
    environment.filters["metric_name"] = words.metric_name
    environment.filters["count"] = words.count
    template = files("fl_privacy.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(context(run, pictures))


def style() -> Markup:
    """The style sheet of all pages."""
    sheet = files("fl_privacy.report").joinpath("style.css").read_text(encoding="utf-8")
    return Markup(sheet.rstrip())


def context(run: Run, pictures: int) -> dict[str, Any]:
    """Everything the template shows."""
    found = run.analyses
    rows = [row for analysis in found if not analysis.is_baseline for row in analysis.rows]
    return {
        "run": run,
        "title": run.path.resolve().name,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": VERSION,
        "style": style(),
        "cap": PSNR_CAP,
        "headlines": headlines(found),
        "notices": [why_no_scores(run), *weak_guesses(found), *interrupted(found)],
        "facts": facts(run),
        "setting": words.batches(rows, run.manifest.local_training) if rows else "",
        "oracles": sorted({oracle for a in found for oracle in a.config.oracle}),
        "galleries": [gallery(run, defense, pictures) for defense in defenses(found)],
        "pictures": pictures,
        "inferred": any(a.infers_property for a in found),
        "spread": spreads(found),
        "tables": [table(found, defense) for defense in defenses(found)],
        "knowledge": [(a, words.knowledge(a, run)) for a in found],
        "endings": [(e, words.group_title(e.defense)) for e in endings(found)],
        "accuracy": accuracy(run),
        "layers": layers_section(run.path, found),
        "privacy": privacy_section(run.path),
        "provenance": provenance(run),
        "commands": commands(run),
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few pairs of words."""
    manifest = run.manifest
    lost = sum(run.lost.values())
    updates = words.count(sum(run.updates.values()), "update") + (f", {lost} lost" if lost else "")
    shape = " × ".join(map(str, manifest.task.input_shape)) if manifest.task else ""
    training = manifest.local_training
    how = words.local_training(training, batch_norm=run.batch_norm) if training else "unknown"
    pairs = [
        ("Dataset", manifest.dataset or "unknown"),
        ("Input", shape),
        ("Classes", str(manifest.task.classes) if manifest.task else ""),
        ("Model", manifest.model or "unknown"),
        ("Clients train", how),
        ("Recorded", updates),
    ]
    return [(name, value) for name, value in pairs if value]


def gallery(run: Run, defense: str | None, pictures: int) -> dict[str, Any]:
    """The pictures of one defense group."""
    names = run.manifest.task.class_names if run.manifest.task else ()
    truth_of = run.truth_of or (lambda row: None)
    pictured = [a for a in run.analyses if not a.infers_property]
    shown = strips(pictured, defense, truth_of, names, pictures)
    widest = max((len(strip.pictures) for strip in shown), default=1)
    return {
        "title": words.group_title(defense),
        "strips": shown,
        "targets": len({row["key"] for a in run.analyses for row in a.of(defense)}),
        "columns": min(widest, 5),
        "phone": 2 if widest == 4 else min(widest, 3),
    }


def spreads(found: Sequence[Analysis]) -> Markup | None:
    """PSNR of every target; None when nothing has one."""
    groups = [
        (
            words.group_title(defense),
            [
                Spread(a.label, values, _psnr(a, defense).interval, a.is_baseline)
                for a in found
                if (values := scored_values(a, defense, PSNR))
            ],
        )
        for defense in defenses(found)
    ]
    groups = [(title, group) for title, group in groups if group]
    if not groups:
        return None
    return spread_figure(groups, "PSNR, dB (further right leaks more)", "PSNR of every target")


def _psnr(analysis: Analysis, defense: str | None) -> Score:
    metric = next(metric for metric in analysis.config.metrics if metric.name == PSNR)
    return score(analysis, defense, metric, None)


def table(found: Sequence[Analysis], defense: str | None) -> dict[str, Any]:
    """The scores of one defense group, as text."""
    lines = scores(found, defense)
    several = sum(a.is_baseline for a in found) > 1
    compared = [
        compared_with(a, found, metric)
        for a in found
        if a.of(defense) and not a.is_baseline
        for metric in a.config.metrics
    ]
    return {
        "title": words.group_title(defense),
        "adversaries": [
            {
                "label": a.label,
                "baseline": a.is_baseline,
                "compared": several and any(a is other for other in compared),
                "oracle": a.config.oracle,
                "told": a.told,
                "lines": _said_once([_line(line) for line in lines if line.analysis is a]),
            }
            for a in found
            if a.of(defense)
        ],
    }


def _said_once(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of which none repeats the counts of the one above it."""
    above = ["", *(line["counts"] for line in lines)]
    return [
        {**line, "counts": "" if line["counts"] == before else line["counts"]}
        for line, before in zip(lines, above, strict=False)
    ]


def _line(line: Score) -> dict[str, Any]:
    metric: MetricInfo = line.metric
    told: list[object] = []
    if metric.set_level:
        told.append(counted(scored(line.analysis.of(line.defense), metric.name)))
        told += [line.analysis.config.relation] if line.analysis.config.relation else []
    return {
        "metric": metric,
        "direction": "higher leaks more" if metric.higher_is_leakier else "lower leaks more",
        "settings": words.metric_settings(metric),
        "counts": "; ".join(map(str, told)),
        "mean": words.interval(line.interval, metric),
        "quartiles": words.spread(line.quartiles, metric),
        "n": line.interval.n,
        "targets": line.targets,
        "gain": words.interval(line.gain, metric, signed=True) if line.gain else "",
        "guess": words.interval(line.guess, metric) if line.guess else "",
        "pairs": line.gain.n if line.gain else 0,
    }


def accuracy(run: Run) -> dict[str, Any] | None:
    """Test accuracy by round, with a sentence; None when the run measured none."""
    if not run.history:
        return None
    attempts: dict[int, Curve] = {}
    for s in run.history:
        curve = attempts.setdefault(s.attempt, Curve(f"attempt {s.attempt}", [], []))
        curve.rounds.append(s.round)
        curve.shares.append(wilson(s.accuracy * s.n, s.n))
    last = run.history[-1]
    share = attempts[last.attempt].shares[-1]
    said = (
        f"{100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}] of "
        f"{last.n:,} test images after round {last.round}"
    )
    if len(attempts) > 1:
        said += f" of attempt {last.attempt}"
    figure = accuracy_figure(list(attempts.values()), f"Test accuracy: {said}")
    return {"figure": figure, "said": said}

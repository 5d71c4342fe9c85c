"""Results to one self-contained HTML page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fl_privacy.component import VERSION
from fl_privacy.metrics.images import PSNR_CAP
from fl_privacy.metrics.statistics import wilson
from fl_privacy.recording_store import write_atomically
from fl_privacy.report import words
from fl_privacy.report.figures import Spread, accuracy_figure, spread_figure
from fl_privacy.report.gallery import strips
from fl_privacy.report.reading import Run, read_run
from fl_privacy.report.scores import (
    Analysis,
    Score,
    attacks,
    baseline_of,
    defenses,
    endings,
    score,
    scored_values,
    scores,
    strongest,
)
from fl_privacy.results import MetricInfo
from fl_privacy.run_folder import RunFolder

PSNR = "psnr"


def write_report(run: Path, *, pictures: int = 16) -> Path:
    """Write ``run/report.html``: one page that asks no other host for anything.

    It shows clients' images, so only its owner may read it.

    Args:
        run: run folder; needs a recording, shows whatever else is there.
        pictures: images shown of each defense group, the first by target key.

    Raises:
        RecordingError, ResultError, ReportError: something in the folder cannot be read.
    """
    page = render(read_run(run), pictures=pictures)
    target = RunFolder(run).report
    write_atomically(target, page.encode())
    return target


def render(run: Run, *, pictures: int) -> str:
    """The page of a run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = words.plain
    environment.filters["metric_name"] = words.metric_name
    environment.filters["count"] = words.count
    template = files("fl_privacy.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(context(run, pictures))


def context(run: Run, pictures: int) -> dict[str, Any]:
    """Everything the template shows."""
    found = run.analyses
    rows = [row for analysis in found if not analysis.is_baseline for row in analysis.rows]
    return {
        "run": run,
        "title": run.path.resolve().name,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": VERSION,
        "cap": PSNR_CAP,
        "headlines": headlines(found),
        "notices": [why_no_scores(run), *interrupted(found)],
        "facts": facts(run),
        "setting": words.batches(rows) if rows else "",
        "oracles": sorted({oracle for a in found for oracle in a.config.oracle}),
        "galleries": [gallery(run, defense, pictures) for defense in defenses(found)],
        "pictures": pictures,
        "spread": spreads(found),
        "tables": [table(found, defense) for defense in defenses(found)],
        "knowledge": [(a, words.knowledge(a, run.manifest.local_training)) for a in found],
        "endings": [(e, words.group_title(e.defense)) for e in endings(found)],
        "accuracy": accuracy(run),
        "provenance": provenance(run),
        "commands": commands(run),
    }


@dataclass(frozen=True)
class Headline:
    """One defense group in a sentence and two numbers."""

    title: str
    sentence: str
    got: str
    guess: str
    oracle: tuple[str, ...]


def headlines(found: Sequence[Analysis]) -> list[Headline]:
    """What the strongest attack got from each defense group that has a PSNR."""
    said = []
    for defense in defenses(found):
        lines = scores(found, defense)
        best = strongest(lines, PSNR)
        if best is None:
            continue
        guesser = baseline_of(best.analysis, found)
        guess = score(guesser, defense, best.metric, None).interval if guesser else None
        said.append(
            Headline(
                title=words.group_title(defense),
                sentence=words.headline(best, guess, attacks(lines, PSNR)),
                got=words.number(best.interval.mean, best.metric),
                guess=words.number(guess.mean, best.metric) if guess else "",
                oracle=best.analysis.config.oracle,
            )
        )
    return said


def why_no_scores(run: Run) -> str:
    """Why there is no headline with numbers; empty when there is one."""
    tried = [a for a in run.analyses if not a.is_baseline]
    if not tried:
        return "No adversary has attacked this recording yet, so there is nothing to score."
    if all(row["status"] == "failed" for a in tried for row in a.rows):
        return "No attack produced anything to score: every target failed, for the reasons below."
    if run.truth_of is None:
        return (
            "The run kept no truth (it was no audit), so reconstructions cannot be compared to "
            "the clients' images and nothing is scored."
        )
    if not headlines(run.analyses):
        return "No reconstruction has a PSNR: the truth of these targets is missing."
    return ""


def interrupted(found: Sequence[Analysis]) -> list[str]:
    """A sentence for each analysis that did not get to its end."""
    return [
        f"The analysis by {a.label} was interrupted after {words.count(len(a.rows), 'target')}; "
        f"the same command goes on where it stopped."
        for a in found
        if not a.config.complete
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few pairs of words."""
    manifest = run.manifest
    lost = sum(run.lost.values())
    updates = words.count(run.updates, "update") + (f", {lost} lost" if lost else "")
    shape = " × ".join(map(str, manifest.task.input_shape)) if manifest.task else ""
    training = manifest.local_training
    pairs = [
        ("Dataset", manifest.dataset or "unknown"),
        ("Input", shape),
        ("Classes", str(manifest.task.classes) if manifest.task else ""),
        ("Model", manifest.model or "unknown"),
        ("Clients train", words.local_training(training) if training else "unknown"),
        ("Recorded", updates),
    ]
    return [(name, value) for name, value in pairs if value]


def gallery(run: Run, defense: str | None, pictures: int) -> dict[str, Any]:
    """The pictures of one defense group."""
    names = run.manifest.task.class_names if run.manifest.task else ()
    truth_of = run.truth_of or (lambda key: None)
    shown = strips(run.analyses, defense, truth_of, names, pictures)
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
    return {
        "title": words.group_title(defense),
        "adversaries": [
            {
                "label": a.label,
                "baseline": a.is_baseline,
                "oracle": a.config.oracle,
                "lines": [_line(line) for line in lines if line.analysis is a],
            }
            for a in found
            if a.of(defense)
        ],
    }


def _line(line: Score) -> dict[str, Any]:
    metric: MetricInfo = line.metric
    return {
        "metric": metric,
        "direction": "higher leaks more" if metric.higher_is_leakier else "lower leaks more",
        "mean": words.interval(line.interval, metric),
        "quartiles": words.spread(line.quartiles, metric),
        "n": line.interval.n,
        "targets": line.targets,
        "gain": words.interval(line.gain, metric, signed=True) if line.gain else "",
        "pairs": line.gain.n if line.gain else 0,
    }


def accuracy(run: Run) -> dict[str, Any] | None:
    """Test accuracy by round, with a sentence; None when the run measured none."""
    if not run.history:
        return None
    shares = [wilson(score.accuracy * score.n, score.n) for score in run.history]
    last, share = run.history[-1], shares[-1]
    said = (
        f"{100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}] of "
        f"{last.n:,} test images after round {last.round}"
    )
    figure = accuracy_figure([s.round for s in run.history], shares, f"Test accuracy: {said}")
    return {"figure": figure, "said": said}


def provenance(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What made these numbers: the run, then each analysis."""
    manifest = run.manifest
    settings = " ".join(f"{k}={v}" for k, v in manifest.run_config.items())
    parts = [
        (
            "Recording",
            [
                ("made", manifest.created),
                ("code digest", manifest.code_digest or "unknown"),
                ("versions", _pairs(manifest.versions)),
                ("run config", settings or "unknown"),
            ],
        )
    ]
    for a in run.analyses:
        seconds = sum(row["seconds"] or 0 for row in a.rows)
        config = a.config
        parts.append(
            (
                a.label,
                [
                    ("adversary", config.adversary),
                    ("model", config.model or "unknown"),
                    ("seed", str(config.seed)),
                    ("configuration digest", config.digest),
                    ("recording digest", config.recording_digest),
                    ("device", f"{config.device}, {config.width or 'any'} targets a batch"),
                    ("device time", f"{seconds:,.1f} s for {words.count(len(a.rows), 'target')}"),
                    ("complete", "yes" if config.complete else "NO: the analysis was interrupted"),
                    ("made", config.created),
                    ("versions", _pairs(config.versions)),
                    ("threat model", _pairs(config.threat_model)),
                ],
            )
        )
    return parts


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value or 'none'}" for name, value in values.items()) or "unknown"


def commands(run: Run) -> list[str]:
    """What to type to get these numbers again from the recording."""
    place = shlex.quote(os.fspath(run.path))
    again = [
        f"fl-privacy attack {place} --adversary {shlex.quote(a.config.adversary)}"
        f" --seed {a.config.seed}"
        for a in run.analyses
        if not a.is_baseline
    ]
    return [*again, f"fl-privacy report {place}"]

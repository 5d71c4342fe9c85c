"""Where the numbers come from: digests, seeds, versions, and the commands that repeat them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_privacy.report import words
from fl_privacy.report.reading import Run
from fl_privacy.report.scores import Analysis
from fl_privacy.threat_model import ThreatModel

Facts = list[tuple[str, str]]


def provenance(run: Run) -> list[tuple[str, Facts]]:
    """What made these numbers: the run, then each analysis."""
    manifest = run.manifest
    settings = " ".join(f"{k}={v}" for k, v in manifest.run_config.items())
    parts: list[tuple[str, Facts]] = [
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
    lines: list[str] = []
    for i, analysis in enumerate(a for a in run.analyses if not a.is_baseline):
        model = Path(f"threat-model-{i + 1}.toml")
        granted = unusual(analysis)
        if granted:
            toml = " ".join(shlex.quote(f"{name} = {json.dumps(v)}") for name, v in granted.items())
            lines.append(f"printf '%s\\n' {toml} > {model}")
        options = [*chosen(run, analysis), *(["--threat-model", str(model)] if granted else [])]
        lines.append(f"fl-privacy attack {place} {shlex.join(options)}")
    return [*lines, f"fl-privacy report {place}"]


def unusual(analysis: Analysis) -> dict[str, Any]:
    """The settings of the threat model that are not the default."""
    default = ThreatModel().model_dump(mode="json")
    model = analysis.config.threat_model
    return {name: value for name, value in model.items() if default.get(name) != value}


def chosen(run: Run, analysis: Analysis) -> list[str]:
    """The options of ``fl-privacy attack`` that choose adversary, model and targets."""
    config = analysis.config
    options = ["--adversary", config.adversary, "--seed", str(config.seed)]
    options += ["--device", config.device]
    if config.model and config.model != run.manifest.model:
        options += ["--model", config.model]
    rounds = sorted({row["round"] for row in analysis.rows if row["round"] is not None})
    if rounds != sorted(run.updates):
        options += ["--rounds", ",".join(map(str, rounds))]
    each = config.threat_model.get("unit") == "update"
    if each and len(analysis.rows) < sum(run.updates[r] for r in rounds):
        options += ["--targets", str(len(analysis.rows))]
    return options

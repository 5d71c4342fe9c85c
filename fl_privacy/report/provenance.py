"""Where the numbers come from: digests, seeds, versions, and the commands that repeat them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

from fl_privacy.layer_results import measurements
from fl_privacy.membership_run import clients_of
from fl_privacy.plan import METRICS
from fl_privacy.report import words
from fl_privacy.report.reading import Run
from fl_privacy.report.scores import BASELINE, Analysis
from fl_privacy.results import nodes_of, rounds_of
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
                *client_facts(run),
            ],
        )
    ]
    return [*parts, *((a.label, _facts(a)) for a in run.analyses)]


def client_facts(run: Run) -> Facts:
    """The clients' own settings, which no recording holds, as far as an audit wrote them down."""
    known = clients_of(run.path).defenses
    if not known:
        return []
    said = (
        f"{defense or 'none'}{f' ({words.samples(own)})' if own else ''}"
        for defense, own in sorted(known.items())
    )
    return [("client-defense, from the audit", "; ".join(said))]


def _facts(analysis: Analysis) -> Facts:
    config = analysis.config
    seconds = sum(row["seconds"] or 0 for row in analysis.rows)
    task = config.task.model_dump(exclude={"class_names"}) if config.task else {}
    batch = f"{config.width or 'any'} targets a batch, {config.threads or 'unknown'} threads"
    return [
        ("adversary", config.adversary),
        ("all its settings", _pairs(config.settings)),
        ("model", config.model or "unknown"),
        ("task", _pairs(task)),
        ("seed", str(config.seed)),
        ("configuration digest", config.digest),
        ("recording digest", config.recording_digest),
        ("code digest", config.code_digest or "unknown"),
        ("device", f"{config.device}, {batch}"),
        ("device time", f"{seconds:,.1f} s for {words.count(len(analysis.rows), 'target')}"),
        ("complete", "yes" if config.complete else "NO: the analysis was interrupted"),
        ("made", config.created),
        ("versions", _pairs(config.versions)),
        ("threat model", _pairs(config.threat_model)),
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items()) or "unknown"


def _shown(value: Any) -> str:
    return "none" if value is None or value in ("", [], ()) else str(value)


def commands(run: Run) -> list[str]:
    """What to type to get these numbers again from the recording."""
    place = shlex.quote(os.fspath(run.path))
    lines: list[str] = []
    typed = [a for a in run.analyses if a.config.adversary != BASELINE and not a.is_null]
    for i, analysis in enumerate(typed):
        granted, task = unusual(analysis), replaced_task(run, analysis)
        options = chosen(run, analysis)
        for option, name, values in (
            ("--threat-model", f"threat-model-{i + 1}.toml", granted),
            ("--task", f"task-{i + 1}.toml", task),
        ):
            if values:
                lines.append(f"{written(values)} > {name}")
                options += [option, name]
        lines.append(f"fl-privacy attack {place} {shlex.join(options)}")
    return [*lines, *measure_commands(run), f"fl-privacy report {place}"]


def measure_commands(run: Run) -> list[str]:
    """What to type to measure the layers again."""
    place, default = shlex.quote(os.fspath(run.path)), ThreatModel().model_dump(mode="json")
    lines: dict[str, None] = {}
    for i, found in enumerate(measurements(run.path), 1):
        config = found.config
        last = [r.rpartition(":")[2] for r in config.rounds]
        options = ["--metric", config.metric, "--rounds", ",".join(last)]
        options += ["--together"] if len(last) > 1 else []
        options += ["--audit"] if config.source == "audit" else []
        options += ["--auxiliary", found.auxiliary] if found.auxiliary else []
        options += ["--seed", str(config.seed), "--device", config.device]
        if config.model and config.model != run.manifest.model:
            options += ["--model", config.model]
        known = {k: v for k, v in config.threat_model.items() if default.get(k) != v}
        other = config.task != run.manifest.task
        task = config.task.model_dump(mode="json", exclude_defaults=True) if other else {}
        for option, name, values in (
            ("--threat-model", f"layers-threat-model-{i}.toml", known),
            ("--task", f"layers-task-{i}.toml", task),
        ):
            if values:
                lines[f"{written(values)} > {name}"] = None
                options += [option, name]
        lines[f"fl-privacy measure {place} {shlex.join(options)}"] = None
    return list(lines)


def written(values: Mapping[str, Any]) -> str:
    """A command that prints values as TOML, which reads single ones as JSON writes them."""
    lines: list[str] = []
    for name, value in values.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        lines += [f"{name}{key and '.'}{key} = {json.dumps(part)}" for key, part in parts]
    return f"printf '%s\\n' {shlex.join(lines)}"


def replaced_task(run: Run, analysis: Analysis) -> dict[str, Any]:
    """The task that was given in place of the manifest's; empty when it was not."""
    task = analysis.config.task
    if task is None or task == run.manifest.task:
        return {}
    return task.model_dump(mode="json", exclude_defaults=True)


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
    for metric in config.metrics:
        if metric.name not in METRICS:
            options += ["--metric", metric.name]
    if config.model and config.model != run.manifest.model:
        options += ["--model", config.model]
    rounds = sorted({r for row in analysis.rows for r in rounds_of(row)})
    if rounds != sorted(run.updates):
        options += ["--rounds", ",".join(map(str, rounds))]
    options += counted(run, analysis, sum(run.updates[r] for r in rounds))
    if analysis.adaptation:
        nodes = {node for row in analysis.rows for node in nodes_of(row["node"] or "")}
        options += [part for node in sorted(nodes) for part in ("--node", node)]
    return options


def counted(run: Run, analysis: Analysis, updates: int) -> list[str]:
    """How many targets to begin with: of an adaptation, as many as the plain attack had."""
    if analysis.config.threat_model.get("unit") != "update":
        return []
    begun = len(analysis.rows)
    if analysis.adaptation:
        plain = [a for a in run.analyses if not a.adaptation and not a.is_baseline]
        begun = max([begun, *(len(a.rows) for a in plain)])
    return ["--targets", str(begun)] if begun < updates else []

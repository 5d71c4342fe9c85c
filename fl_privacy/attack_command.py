"""What ``fl-privacy attack`` and ``fl-privacy demo`` do once their options are read."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from fl_privacy import component
from fl_privacy.analysis import AnalysisError, Plan, analyze, baseline_plan
from fl_privacy.attack_progress import attack_progress
from fl_privacy.component import ComponentError, describe
from fl_privacy.metrics.statistics import mean_interval
from fl_privacy.recording import Recording
from fl_privacy.results import ResultSet
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import ModelFactory, Task


def attack(
    run: Path, plan: Plan, *, model: str = "", task: Task | None = None
) -> tuple[ResultSet, ResultSet]:
    """Run an adversary and the baseline on the same targets, each with its progress bar."""
    recording = Recording(RunFolder(run).recording)
    factory = custom_model(model) if model else None
    plans = (plan, baseline_plan(plan, recording))
    results = []
    for each in plans:
        with attack_progress(each.adversary) as progress:
            results.append(
                analyze(run, each, model=factory, model_name=model, task=task, progress=progress)
            )
    return results[0], results[1]


def scores(results: Sequence[ResultSet]) -> Table:
    """Mean and 95 % interval of every metric: a column for each adversary, defenses below."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("score")
    for result in results:
        table.add_column(result.config.adversary.replace("_", " "), justify="right")
    groups = sorted({row["defense"] or "" for result in results for row in result.rows()})
    for defense in groups:
        held = [[r for r in result.rows() if (r["defense"] or "") == defense] for result in results]
        count = max(len(rows) for rows in held)
        title = f"[bold]{escape(defense) or 'undefended'}[/], {count} targets"
        table.add_row(title)
        for metric in results[0].config.metrics:
            cells = [interval([row[metric.name] for row in rows]) for rows in held]
            table.add_row(f"  {metric.name}, {metric.unit}", *cells)
        table.add_section()
    return table


def interval(values: Sequence[float | None]) -> str:
    """``mean [low, high]``, or a dash when nothing could be scored."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = mean_interval(known)
    return escape(f"{mean.mean:.3g} [{mean.low:.3g}, {mean.high:.3g}]")


def failures(result: ResultSet) -> Mapping[str, int]:
    """Reason -> number of targets that could not be attacked."""
    reasons = [row["message"] for row in result.rows() if row["status"] == "failed"]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def read_threat_model(path: Path | None) -> ThreatModel:
    """The threat model in a TOML file; the default one without a file.

    Raises:
        AnalysisError: the file is missing or not TOML.
        ComponentError: an unknown or wrong setting.
    """
    return ThreatModel() if path is None else _read(path, ThreatModel)


def read_task(path: Path) -> Task:
    """The task (input shape, classes, mean, std) in a TOML file."""
    task: Task = _read(path, Task)
    return task


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise AnalysisError(f"cannot read {path}: {error}; expected a TOML file") from None
    except ValidationError as error:
        raise ComponentError(f"{path}: {describe(kind.__name__, kind, error)}") from None


def adversary_spec(name: str, pairs: Sequence[str]) -> str:
    """The component spec of an adversary with ``KEY=VALUE`` settings.

    Raises:
        ComponentError: a pair without ``=``, an unknown adversary, setting or value.
    """
    given: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ComponentError(
                f"--set expects KEY=VALUE, got {pair!r}; such as --set iterations=500"
            )
        given[key.strip()] = value.strip()
    adversary = component.create("adversaries", name, given)
    return component.spec_of("adversaries", adversary)


def custom_model(path: str) -> ModelFactory:
    """The model factory a user typed as ``package.module:factory``.

    Raises:
        AnalysisError: it cannot be imported, or does not return a module.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise AnalysisError(f"--model expects package.module:factory, got {path!r}")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AnalysisError(
            f"cannot import {path!r}: {error}; is its folder on PYTHONPATH?"
        ) from None
    if not callable(factory) or not isinstance(factory(), nn.Module):
        raise AnalysisError(f"{path} does not return a torch.nn.Module when called")
    return factory  # type: ignore[no-any-return]

"""What ``fl-privacy attack`` and ``fl-privacy demo`` do once their options are read."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console, Group
from rich.table import Table

from fl_privacy import component
from fl_privacy.analysis import execute, prepare
from fl_privacy.attack_progress import attack_progress
from fl_privacy.baseline_job import prepare_baseline
from fl_privacy.component import ComponentError, describe
from fl_privacy.custom_model import custom_model
from fl_privacy.plan import AnalysisError, Plan
from fl_privacy.printable import printable
from fl_privacy.property_rows import scored
from fl_privacy.property_table import property_table
from fl_privacy.report import words
from fl_privacy.report.scores import Analysis, Score, analyses, defenses, score
from fl_privacy.results import ResultSet
from fl_privacy.threat_model import ThreatModel
from fl_privacy.titled_table import titled_table
from fl_privacy.types import Task


def attack(
    run: Path, plan: Plan, *, model: str = "", task: Task | None = None
) -> tuple[ResultSet, ResultSet]:
    """Run an adversary and the baseline on the same targets, each with its progress bar.

    Whatever can refuse either of them does so before the first attack.
    """
    factory = custom_model(model) if model else None
    main = prepare(run, plan, model=factory, model_name=model, task=task)
    guess, weaker = prepare_baseline(run, plan, model=factory, model_name=model, task=task)
    if weaker:
        Console(stderr=True, soft_wrap=True, emoji=False).print(f"[yellow]{printable(weaker)}[/]")
    with attack_progress(main.config.adversary) as progress:
        attacked = execute(main, progress=progress)
    with attack_progress(guess.config.adversary) as progress:
        return attacked, execute(guess, progress=progress)


def scores(results: Sequence[ResultSet]) -> Group:
    """A table for each defense group: a row an adversary, mean and 95 % interval a metric."""
    columns = [analyses([result])[0] for result in results]
    if columns[0].infers_property:
        attack, null = columns
        return Group(*(property_table(attack, null, group) for group in defenses(columns)))
    named = [(words.plain(column.config.adversary), column) for column in columns]
    return Group(*(group_table(named, defense) for defense in defenses(columns)))


def group_table(named: Sequence[tuple[str, Analysis]], defense: str | None) -> Table:
    """The scores of one defense group, narrow enough for a terminal of 80 columns.

    Those that the first adversary has: what infers no inputs has no PSNR.
    """
    table = titled_table(words.group_title(defense))
    rows, every = named[0][1].rows, named[0][1].config.metrics
    metrics = [m for m in every if any(row[m.name] is not None for row in rows)] or every
    table.add_column("mean, 95 % interval", overflow="fold")
    for metric in metrics:
        head = printable(f"{words.plain(metric.name)}\n{metric.unit}")
        table.add_column(head, justify="right", overflow="fold")
    for name, column in named:
        lines = [score(column, defense, metric, None) for metric in metrics]
        scored = max(line.interval.n for line in lines)
        table.add_row(f"{printable(name)}\nn {scored}", *map(cell, lines))
    return table


def cell(line: Score) -> str:
    """Mean and interval as in the report, on two lines, or a dash when nothing was scored."""
    if not line.interval.n:
        return "-"
    mean, bracket, bounds = words.interval(line.interval, line.metric).partition("[")
    return printable(f"{mean.strip()}\n{bracket}{bounds}")


def no_scores(result: ResultSet) -> str:
    """Why nothing was scored; empty when something was."""
    rows = [row for row in result.rows() if row["status"] != "failed"]
    whole = next((m.name for m in result.config.metrics if m.set_level), "")
    truth = scored(rows, whole)[1]
    if truth and {True, False} - set(truth):
        return (
            "No AUC: expected batches that are known to have the property and batches known to "
            "lack it. That needs an audit (simulate --audit), samples with the property in the "
            "run's data set, and more rounds where all batches are alike."
        )
    names = [metric.name for metric in result.config.metrics]
    if not rows or any(row[name] is not None for row in rows for name in names):
        return ""
    return (
        "No scores: the run kept no truth of these targets, so reconstructions cannot be compared "
        "to the clients' data. Scores need an audit: record with audit=true (simulate --audit, "
        "deploy run --audit); copy what the clients keep into the run's folder truth, and the "
        "same command scores it."
    )


def failures(result: ResultSet) -> Mapping[str, int]:
    """Reason -> number of targets that could not be attacked."""
    reasons = Counter(row["message"] for row in result.rows() if row["status"] == "failed")
    return {reason: reasons[reason] for reason in sorted(reasons)}


def local_folder(run: str) -> Path:
    """The run folder a user named, which has to be on this machine.

    Raises:
        AnalysisError: a URL.
    """
    if "://" in run:
        raise AnalysisError(
            f"expected a local run folder, got {run}: results, truth and report lie beside the "
            f"recording, so copy it to RUN/recording first (docs/threat-model.md)"
        )
    return Path(run)


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

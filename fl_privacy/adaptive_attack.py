"""What ``fl-privacy attack --adaptive`` runs and shows: the plain attack and every adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group

from fl_privacy.adaptive_command import adapt
from fl_privacy.analysis import Job, execute, prepare
from fl_privacy.attack_command import failures, group_table
from fl_privacy.attack_progress import attack_progress
from fl_privacy.baseline_job import prepare_baseline
from fl_privacy.component import ComponentError
from fl_privacy.custom_model import custom_model
from fl_privacy.left_out import write_left_out
from fl_privacy.plan import PLAIN, AnalysisError, Plan
from fl_privacy.printable import printable
from fl_privacy.report.scores import BASELINE, Analysis, analyses, defenses, score
from fl_privacy.results import ResultSet
from fl_privacy.threat_model import ThreatModelError
from fl_privacy.types import Task


@dataclass(frozen=True)
class Attacked:
    """Results by name, the plain one first and the baselines last; what was left out and why."""

    results: list[tuple[str, ResultSet]]
    skipped: list[tuple[str, str]]


def attack_adaptively(
    run: Path, plan: Plan, *, model: str = "", task: Task | None = None
) -> Attacked:
    """Run the plan, every adaptation and the baselines, each with its progress bar.

    Whatever can refuse the plan does so before the first attack; an adaptation that is refused
    is left out.
    """
    factory = custom_model(model) if model else None
    adaptive = adapt(run, plan, model=factory, task=task)
    jobs, skipped = [], list(adaptive.skipped)
    for name, one in adaptive.plans:
        try:
            jobs.append((name, prepare(run, one, model=factory, model_name=model, task=task)))
        except (ThreatModelError, ComponentError, AnalysisError) as error:
            if name == PLAIN:
                raise
            skipped.append((name, str(error)))
    for unit in dict.fromkeys(job.config.threat_model["unit"] for _, job in jobs):
        own = unit == plan.threat_model.unit
        guess = plan if own else over_units(plan, [one for _, one in adaptive.plans], str(unit))
        job, weaker = prepare_baseline(run, guess, model=factory, model_name=model, task=task)
        warn(weaker if own else "")
        jobs.append((BASELINE if own else f"{BASELINE}, {unit}", job))
    attacked = Attacked([(name, run_job(name, job)) for name, job in jobs], skipped)
    write_left_out(run, plan.adversary, [*skipped, *within(attacked.results)])
    return attacked


def within(results: Sequence[tuple[str, ResultSet]]) -> list[tuple[str, str]]:
    """Those that attack some targets of another analysis in the same way, so are part of it."""
    first: dict[Path, str] = {}
    found = []
    for name, result in results:
        if (whole := first.setdefault(result.folder, name)) != name:
            found.append(
                (
                    name,
                    f"its targets are among those of {whole}, attacked alike, so it is no rival of "
                    f"its own in the comparison; the terminal shows its scores",
                )
            )
    return found


def over_units(plan: Plan, plans: Sequence[Plan], unit: str) -> Plan:
    """The plan on another unit of attack, about the clients that some of ``plans`` attack so."""
    nodes = {n for one in plans if one.threat_model.unit == unit for n in one.nodes}
    threat_model = plan.threat_model.model_copy(update={"unit": unit})
    return plan.model_copy(update={"threat_model": threat_model, "nodes": tuple(sorted(nodes))})


def run_job(name: str, job: Job) -> ResultSet:
    """Execute one analysis under its progress bar."""
    with attack_progress(name) as progress:
        return execute(job, progress=progress)


def warn(text: str) -> None:
    """A line on standard error."""
    if text:
        Console(stderr=True, soft_wrap=True, emoji=False).print(f"[yellow]{printable(text)}[/]")


def notes(attacked: Attacked) -> list[str]:
    """What was left out and why, and what failed, a line each."""
    lines = [f"Not run: {name} ({why})" for name, why in attacked.skipped]
    for name, result in attacked.results[1:]:
        lines += [f"{name}: {n} targets not attacked: {why}" for why, n in failures(result).items()]
    return lines


def strengths(attacked: Attacked) -> Group:
    """A table for each defense group, the strongest attack by the first metric on top."""
    named = [(name, analyses([result])[0]) for name, result in attacked.results]
    return Group(
        *(
            group_table(by_strength(named, defense), defense)
            for defense in defenses([analysis for _, analysis in named])
        )
    )


def by_strength(
    named: Sequence[tuple[str, Analysis]], defense: str | None
) -> list[tuple[str, Analysis]]:
    """Those that treated a group, the leakiest mean first; marked when told the defense."""

    def strength(one: tuple[str, Analysis]) -> float:
        metric = one[1].config.metrics[0]
        mean = score(one[1], defense, metric, None).interval.mean
        leaky = mean if metric.higher_is_leakier else -mean
        return -math.inf if math.isnan(leaky) else leaky

    def marked(name: str, analysis: Analysis) -> str:
        known = analysis.config.threat_model.get("defense") and not analysis.is_baseline
        return f"{name} [told]" if known else name

    treated = [one for one in named if one[1].of(defense)]
    ranked = sorted(treated, key=strength, reverse=True)
    return [(marked(name, analysis), analysis) for name, analysis in ranked]

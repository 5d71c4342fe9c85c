"""Which layers to withhold, and what adversaries get when these are, or others.

A server that does not see a layer is a threat model with ``withheld``: adversaries that attacked
the run before attack the same updates again under it. The federation is not run again, so what
the defense costs in accuracy, and how later rounds would differ, is not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fl_privacy.analysis import Job, prepare
from fl_privacy.component import create, parse, spec_of
from fl_privacy.metrics.auc import auc_above_mean
from fl_privacy.metrics.statistics import Interval
from fl_privacy.plan import AnalysisError, Plan
from fl_privacy.property_rows import scored
from fl_privacy.protection import FOLDER
from fl_privacy.report.analyses import Rows
from fl_privacy.report.scores import Analysis, gain
from fl_privacy.results import MetricInfo, rounds_of
from fl_privacy.results_format import client_of
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import ModelFactory, Task


def better(first: Rows, others: Sequence[Rows], metric: MetricInfo) -> Interval:
    """How much more ``others`` leak in the mean than the ``first``, target by target.

    With its 95 % interval over the targets that all scored, clients being independent.
    """
    tables = [{row["key"]: row for row in rows} for rows in (first, *others)]
    values: dict[str, list[Any]] = {
        key: [table.get(key, {}).get(metric.name) for table in tables] for key in tables[0]
    }
    scores = {key: found for key, found in values.items() if None not in found}
    if metric.set_level:
        own, *rest = (scored([table[key] for key in scores], metric.name) for table in tables)
        less = auc_above_mean(own.scores, [one.scores for one in rest], own.has, own.clients)
        return Interval(-less.mean, -less.high, -less.low, less.n)
    pairs = [(fmean(r), own, client_of(tables[0][key])) for key, (own, *r) in scores.items()]
    return gain(pairs, metric)


def attacks_of(found: Sequence[Analysis]) -> list[Analysis]:
    """The attacks that are repeated: plain ones that saw every layer, each once."""
    plain = [
        a
        for a in found
        if not a.is_baseline and not a.adaptation and not a.config.threat_model.get("withheld")
    ]
    return list({plan_without(a, ()).model_dump_json(): a for a in plain}.values())


def attack_again(
    run: Path,
    before: Analysis,
    withheld: Sequence[str],
    *,
    model: ModelFactory | None = None,
    task: Task | None = None,
) -> Job:
    """The analysis ``before`` on the same targets, without seeing the ``withheld`` layers.

    Its results go to the run's folder of protection, apart from those of plain attacks.

    Raises:
        ThreatModelError, ComponentError, AnalysisError: it cannot be run so.
    """
    plan = plan_without(before, withheld)
    job = prepare(
        run, plan, model=model, model_name=before.config.model if model else "", task=task
    )
    keys = {row["key"] for row in before.rows}
    same = [o for o in job.observations if o.key in keys]
    if not same:
        raise AnalysisError(f"{before.label}: none of its targets is in the recording any more")
    folder = run / FOLDER / "results" / job.config.folder_name
    return replace(job, observations=same, folder=folder)


def plan_without(before: Analysis, withheld: Sequence[str]) -> Plan:
    """What asks for the analysis ``before`` under a threat model that withholds layers."""
    config = before.config
    known = ThreatModel.model_validate(config.threat_model)
    rounds = sorted({r for row in before.rows for r in rounds_of(row)})
    return Plan(
        adversary=whole_update(config.adversary, config.width),
        threat_model=known.model_copy(update={"withheld": (*known.withheld, *withheld)}),
        metrics=tuple(m.name for m in config.metrics if not parse(m.name)[1].get("layer")),
        seed=config.seed,
        device=config.device,
        rounds=",".join(map(str, rounds)),
    )


def whole_update(adversary: str, width: int) -> str:
    """The spec of an adversary that looks at all it sees, at the width of a batch it had."""
    made = create("adversaries", adversary)
    settings: dict[str, Any] = {}
    if "width" in type(made).model_fields and width:
        settings["width"] = width
    if parse(adversary)[0] == "property_inference":
        settings["layers"] = "all"
    return spec_of("adversaries", made.model_copy(update=settings))

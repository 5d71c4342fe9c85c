"""Which layers to withhold, and what adversaries get when these are, or others.

A server that does not see a layer is a threat model with ``withheld``: adversaries that attacked
the run before attack the same updates again under it. The federation is not run again, so what
the defense costs in accuracy, and how later rounds would differ, is not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fl_privacy.analysis import Job, prepare
from fl_privacy.component import create, parse, spec_of
from fl_privacy.layer_results import Measurement, by_layer
from fl_privacy.plan import AnalysisError, Plan
from fl_privacy.prediction import LayerAuc
from fl_privacy.protection import FOLDER, ProtectionError
from fl_privacy.report.scores import Analysis
from fl_privacy.results import rounds_of
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import ModelFactory, Task

AUC = "auc"
"""Ranks layers by what an attacker got from each."""


@dataclass(frozen=True)
class Ranking:
    """Layers by a number, the leakiest first; ``by`` says which number that is."""

    by: str
    unit: str
    order: tuple[tuple[str, float], ...]


def ranking_of(by: str, measured: Sequence[Measurement], aucs: Sequence[LayerAuc]) -> Ranking:
    """Layers by the metric ``by`` (its name or whole spec), or by ``auc``; empty: that, if there.

    Of several measurements or attacks the mean over them is taken, a layer that one lacks by
    those that have it.

    Raises:
        ProtectionError: nothing ranks the layers so; lists what there is.
    """
    names = sorted({m.config.metric for m in measured} | ({AUC} if aucs else set()))
    if not by and not aucs and len({m.config.name for m in measured}) == 1:
        by = measured[0].config.name
    by = by or (AUC if aucs else "")
    own = [m for m in measured if by in (m.config.name, m.config.metric)]
    if by == AUC and aucs:
        tables = [{a.layer: a.auc.mean} for a in aucs]
        unit = "AUC"
    elif own:
        tables, unit = [dict(by_layer(m)) for m in own], own[0].unit
    else:
        there = "; ".join(names) or "nothing yet: fl-privacy measure, or attack with layers=each"
        said = f"nothing ranks layers by {by!r}" if by else "nothing says how to rank layers"
        raise ProtectionError(f"{said}: choose --by of what the run holds ({there})")
    held = {layer: [t[layer] for t in tables if layer in t] for t in tables for layer in t}
    order = sorted(((n, fmean(v)) for n, v in held.items()), key=lambda one: -one[1])
    return Ranking(by, unit, tuple(order))


def chosen(ranking: Ranking, budget: int) -> tuple[str, ...]:
    """The ``budget`` leakiest layers.

    Raises:
        ProtectionError: there are not more layers than that.
    """
    if not 1 <= budget < len(ranking.order):
        raise ProtectionError(
            f"expected a budget of 1 to {len(ranking.order) - 1} layers, as {ranking.by} ranks "
            f"{len(ranking.order)}, got {budget}"
        )
    return tuple(layer for layer, _ in ranking.order[:budget])


def random_sets(
    layers: Sequence[str], budget: int, repeats: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """``repeats`` draws of ``budget`` of the ``layers``, in their order; equal ones may recur."""
    sets = []
    for repeat in range(repeats):
        draw = generator(seed, "layers to withhold", budget, repeat)
        picked = torch.randperm(len(layers), generator=draw)[:budget].sort().values
        sets.append(tuple(layers[i] for i in picked.tolist()))
    return tuple(sets)


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

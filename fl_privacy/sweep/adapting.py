"""Who attacks a point of a sweep: the plain adversary, those that know the defense, and all others.

What needs no defense to be known is tried on every point, the undefended one too: otherwise
each defense would meet more adversaries than none does, and a weak one would look worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from adversaries.adaptive import Adaptation, applied, early, linked
from adversaries.adaptive_moves import Known, Move, prior, together
from adversaries.situation import Situation, situation
from fl_privacy import component
from fl_privacy.adaptive_command import adapted, adaptive_plans
from fl_privacy.analysis import of_nodes
from fl_privacy.component import Component
from fl_privacy.plan import Plan
from fl_privacy.recording import Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.types import ModelFactory


def plans_of(run: Path, plan: Plan, *, model: ModelFactory | None = None) -> list[tuple[str, Plan]]:
    """`adaptive_plans` and every adaptation that needs no defense, each adversary once.

    Raises:
        AnalysisError: what `adaptive_plans` and `fl_privacy.analysis.prepare` refuse.
    """
    base: Component = component.create("adversaries", plan.adversary)
    found = adaptive_plans(run, plan, model=model)
    here = _situation(run, plan, model)
    for move in moves(base, here):
        one = applied(move, base, simulated=False)
        if not isinstance(one, Adaptation):
            continue
        made = adapted(plan, one, plan.threat_model, plan.nodes)
        if _identity(made) not in [_identity(other) for _, other in found]:
            found.append((one.name, made))
    return found


def moves(base: Component, here: Situation) -> Iterator[Move]:
    """A stronger image prior, all rounds of a client, early rounds: alone, and with the prior."""
    stronger = prior(Known(None, here, base))
    yield stronger
    for move in (linked(here), early(here)):
        yield move
        if not move.hindrance:
            yield together([stronger, move])


def _situation(run: Path, plan: Plan, model: ModelFactory | None) -> Situation:
    recording = Recording(RunFolder(run).recording)
    bare = plan.threat_model.model_copy(update={"labels": "inferred", "auxiliary": ""})
    seen = bare.observe(recording, model=model, rounds=plan.rounds)
    whole = bare.model_copy(update={"unit": "client"})
    here = situation(
        of_nodes(seen[: plan.targets], plan.nodes),
        whole.observe(recording, model=model, rounds=plan.rounds),
    )
    if plan.threat_model.unit == "update":
        return here
    return replace(here, unlinkable=f"the plan's unit of attack is {plan.threat_model.unit}")


def _identity(plan: Plan) -> tuple[str, ...]:
    return plan.adversary, plan.threat_model.unit, plan.rounds

"""The plans of ``fl-privacy attack --adaptive``: an attack, and its adaptations to a defense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adversaries.adaptive import Adaptation, Skipped, adaptations
from adversaries.situation import Situation, situation
from fl_privacy import component
from fl_privacy.analysis import of_nodes
from fl_privacy.component import Component, ComponentError
from fl_privacy.plan import PLAIN, AnalysisError, Plan
from fl_privacy.recording import Recording
from fl_privacy.result_rows import members_of
from fl_privacy.results import nodes_of
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import ModelFactory, Observation, Task


@dataclass(frozen=True)
class Adaptive:
    """Analyses by name, the plain one first, and what was left out, with the reason."""

    plans: list[tuple[str, Plan]]
    skipped: list[tuple[str, str]]


def adapt(
    run: Path, plan: Plan, *, model: ModelFactory | None = None, task: Task | None = None
) -> Adaptive:
    """The plan itself, named "plain", and one for each adaptation to the defenses of its targets.

    The defense is that of the plan's threat model, or else what the audit wrote down; each
    adaptation is about the clients with that defense alone.

    Raises:
        AnalysisError: the defense is unknown; what `fl_privacy.analysis.prepare` refuses.
    """
    return adapt_to(run, plan, seen_by(run, plan, model=model, task=task))


@dataclass(frozen=True)
class Seen:
    """The targets of a plan, and their clients' rounds linked into one target each."""

    targets: list[Observation]
    linked: list[Observation]

    def situation(self, plan: Plan, nodes: frozenset[str] | None = None) -> Situation:
        """What decides how to adapt to the targets of those ``nodes`` alone; None: of all."""
        own, linked = (
            [o for o in some if nodes is None or behind(o) <= nodes]
            for some in (self.targets, self.linked)
        )
        here = situation(own, linked)
        if plan.threat_model.unit == "update":
            return here
        return replace(here, unlinkable=f"the plan's unit of attack is {plan.threat_model.unit}")


def seen_by(
    run: Path, plan: Plan, *, model: ModelFactory | None = None, task: Task | None = None
) -> Seen:
    """What a plan attacks, without any oracle."""
    recording = Recording(RunFolder(run).recording)
    bare = plan.threat_model.model_copy(update={"labels": "inferred", "auxiliary": ""})

    def observe(granted: ThreatModel) -> list[Observation]:
        return granted.observe(recording, model=model, task=task, rounds=plan.rounds)

    return Seen(
        targets=of_nodes(observe(bare)[: plan.targets], plan.nodes),
        linked=observe(bare.model_copy(update={"unit": "client"})),
    )


def adapt_to(run: Path, plan: Plan, seen: Seen) -> Adaptive:
    """`adapt` to what was seen before."""
    vault, targets = TruthVault(RunFolder(run).truth), seen.targets
    base: Component = component.create("adversaries", plan.adversary)
    groups, unclear = groups_of(targets, vault, plan.threat_model.defense)
    found = Adaptive([(PLAIN, plan)], unclear)
    for spec, nodes in groups.items():
        try:
            defenses = component.create_all("defenses", spec)
        except ComponentError as error:
            found.skipped.append((f"adapting to {spec}", str(error)))
            continue
        own = [o for o in targets if behind(o) <= nodes]
        known = tuple(with_noise(defense, own, vault) for defense in defenses)
        full = spec if known == defenses else component.spec_of_all("defenses", known)
        here = seen.situation(plan, nodes)
        told = plan.threat_model.model_copy(update={"defense": full})
        for one in adaptations(known, base, here):
            name = one.name if len(groups) == 1 else f"{one.name} ({spec})"
            if isinstance(one, Skipped):
                found.skipped.append((name, one.reason))
            else:
                found.plans.append((name, adapted(plan, one, told, sorted(nodes))))
    return found


def groups_of(
    targets: Sequence[Observation], vault: TruthVault, told: str
) -> tuple[dict[str, frozenset[str]], list[tuple[str, str]]]:
    """Each defense that is known with the clients that have it; and what is adapted to nothing.

    One that the threat model tells of is that of all clients, unless the audit wrote down
    which have it.

    Raises:
        AnalysisError: no defense is known.
    """
    said: dict[str, set[str]] = {}
    for target in targets:
        found = {vault.defense(e) or "" for e in members_of(target.exchanges) if vault.has(e)}
        for node in behind(target) if found else ():
            said.setdefault(node, set()).update(found)
    specs = sorted({spec for own in said.values() for spec in own} - {""})
    alike = {spec: frozenset(node for node, own in said.items() if own == {spec}) for spec in specs}
    groups = {
        spec: nodes
        for spec, nodes in alike.items()
        if any(behind(target) <= nodes for target in targets)
    }
    if told:
        wanted = component.canonical("defenses", told)
        same = [n for spec, n in groups.items() if component.canonical("defenses", spec) == wanted]
        return {told: frozenset().union(*(same or [behind(target) for target in targets]))}, []
    if not said:
        raise AnalysisError(
            "--adaptive needs to know the defense, and neither the threat model nor an audit tells "
            'it: set defense = "DEFENSE" in the file of --threat-model, such as '
            '"gaussian_noise(scale=0.1)"'
        )
    alone = {node for nodes in groups.values() for node in nodes}
    mixed = [f"node {node}" for node in sorted(said) if said[node] != {""} and node not in alone]
    unclear = [
        (name, "its updates, or those of its aggregate, differ in defense") for name in mixed
    ]
    if all(own == {""} for own in said.values()):
        unclear = [("adaptive attacks", "no target is defended, so there is nothing to adapt to")]
    return groups, unclear


def with_noise(defense: Any, targets: Sequence[Observation], vault: TruthVault) -> Any:
    """A defense by epsilon with the noise multiplier that its clients chose, as audited.

    A server could compute it: it follows from epsilon, delta, rounds, batch size and the number
    of samples, which clients send. Of clients with other numbers, it is the root mean square.
    """
    chosen_by_epsilon = getattr(defense, "epsilon", None) is not None
    if not chosen_by_epsilon or getattr(defense, "noise_multiplier", 0.0) is not None:
        return defense
    told = (vault.defense_stats(e) for o in targets for e in members_of(o.exchanges))
    chosen = [stats["noise_multiplier"] for stats in told if "noise_multiplier" in stats]
    if not chosen:
        return defense
    noise = float(f"{math.hypot(*chosen) / math.sqrt(len(chosen)):.6g}")
    return defense.model_copy(update={"noise_multiplier": noise})


def behind(target: Observation) -> frozenset[str]:
    """The clients behind a target."""
    return frozenset(nodes_of(target.exchanges[-1].node))


def adapted(plan: Plan, one: Adaptation, told: ThreatModel, nodes: Sequence[str]) -> Plan:
    """The plan of an adaptation, about those clients alone."""
    threat_model = told if one.told else plan.threat_model
    return plan.model_copy(
        update={
            "adversary": one.adversary,
            "threat_model": threat_model.model_copy(update=dict(one.threat_model)),
            "rounds": one.rounds or plan.rounds,
            "nodes": tuple(nodes),
            "adaptation": f"{one.name}: {one.reason}",
        }
    )

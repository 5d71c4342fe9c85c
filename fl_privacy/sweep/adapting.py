"""Who attacks a point of a sweep: the plain adversary, those that know the defense, and all others.

What needs no defense to be known is tried on every point, the undefended one too: otherwise
each defense would meet more adversaries than none does, and a weak one would look worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from adversaries.adaptive import Adaptation, applied, early, linked
from adversaries.adaptive_moves import Known, Move, prior, together
from adversaries.situation import Situation
from fl_privacy import component
from fl_privacy.adaptive_command import Adaptive, adapt_to, adapted, seen_by
from fl_privacy.component import Component
from fl_privacy.plan import Plan
from fl_privacy.types import ModelFactory


def plans_of(
    run: Path, plan: Plan, *, most: int | None = None, model: ModelFactory | None = None
) -> Adaptive:
    """`adapt_to` and every adaptation that needs no defense, each adversary once.

    With ``most`` so many of either, those that should do most first, so that points are met by
    the same number of adversaries that know no defense.

    Raises:
        AnalysisError: what `adapt_to` and `fl_privacy.analysis.prepare` refuse.
    """
    base: Component = component.create("adversaries", plan.adversary)
    seen = seen_by(run, plan, model=model)
    adapted_to = adapt_to(run, plan, seen)
    first, *own = adapted_to.plans
    found = Adaptive([first, *own[:most]], adapted_to.skipped)
    for move in islice(moves(base, seen.situation(plan)), most):
        one = applied(move, base, simulated=False)
        if not isinstance(one, Adaptation):
            if one.name not in dict(found.skipped):
                found.skipped.append((one.name, one.reason))
            continue
        made = adapted(plan, one, plan.threat_model, plan.nodes)
        if _identity(made) not in [_identity(other) for _, other in found.plans]:
            found.plans.append((one.name, made))
    return found


def moves(base: Component, here: Situation) -> Iterator[Move]:
    """A stronger image prior, all rounds of a client, early rounds: alone, and with the prior."""
    stronger = prior(Known(None, here, base))
    yield stronger
    for move in (linked(here), early(here)):
        yield move
        if not move.hindrance:
            yield together([stronger, move])


def _identity(plan: Plan) -> tuple[str, ...]:
    return plan.adversary, plan.threat_model.unit, plan.rounds

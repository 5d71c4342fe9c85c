"""Every point of a sweep meets what needs no defense to be known, the undefended one too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fl_privacy.adaptive_command import adapt
from fl_privacy.plan import Plan
from fl_privacy.sweep.adapting import plans_of
from fl_privacy.testing import toy_model

Record = Callable[[Path, Sequence[tuple[int, str]]], Path]
BASE = Plan(adversary="gradient_similarity(iterations=3, width=4)")


def test_an_undefended_point_meets_what_needs_no_defense(tmp_path: Path, record: Record) -> None:
    run = record(tmp_path, [(1, "3"), (1, "4"), (2, "3"), (2, "4")])
    assert len(adapt(run, BASE, model=toy_model).plans) == 1
    plans = dict(plans_of(run, BASE, model=toy_model))
    assert list(plans) == [
        *("plain", "stronger image prior", "early rounds"),
        "stronger image prior and early rounds",
    ]
    assert all(plan.threat_model == BASE.threat_model for plan in plans.values())
    assert all(plan.nodes == () for plan in plans.values())
    one_round = record(tmp_path / "one", [(1, "3")])
    assert list(dict(plans_of(one_round, BASE, model=toy_model))) == ["plain", *list(plans)[1:2]]


def test_a_defended_point_meets_each_adversary_once(tmp_path: Path, record: Record) -> None:
    run = record(tmp_path, [(1, "5"), (2, "5")])
    own = adapt(run, BASE, model=toy_model).plans
    every = plans_of(run, BASE, model=toy_model)
    assert every == own  # against noise all that is generic is there already
    undefended = record(tmp_path / "none", [(1, "4"), (2, "4")])
    generic = {(p.adversary, p.rounds) for _, p in plans_of(undefended, BASE, model=toy_model)}
    assert generic <= {(p.adversary, p.rounds) for _, p in every}

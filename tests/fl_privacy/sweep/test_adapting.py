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
    plans = dict(plans_of(run, BASE, model=toy_model).plans)
    assert list(plans) == [
        *("plain", "stronger image prior", "early rounds"),
        "stronger image prior and early rounds",
    ]
    assert all(plan.threat_model == BASE.threat_model for plan in plans.values())
    assert all(plan.nodes == () for plan in plans.values())
    one_round = record(tmp_path / "one", [(1, "3")])
    found = plans_of(one_round, BASE, model=toy_model)
    assert list(dict(found.plans)) == ["plain", *list(plans)[1:2]]
    assert {"rounds of one client", "early rounds"} <= set(dict(found.skipped))


def test_a_defended_point_meets_each_adversary_once(tmp_path: Path, record: Record) -> None:
    run = record(tmp_path, [(1, "5"), (2, "5")])
    own = adapt(run, BASE, model=toy_model).plans
    every = plans_of(run, BASE, model=toy_model).plans
    assert every == own  # against noise all that is generic is there already
    undefended = record(tmp_path / "none", [(1, "4"), (2, "4")])
    others = plans_of(undefended, BASE, model=toy_model).plans
    generic = {(p.adversary, p.rounds) for _, p in others}
    assert generic <= {(p.adversary, p.rounds) for _, p in every}


def test_a_number_takes_so_many_that_know_the_defense_and_so_many_that_need_not(
    tmp_path: Path, record: Record
) -> None:
    """So that the undefended point meets no adversary that a defended one is spared."""
    undefended = record(tmp_path / "none", [(1, "3"), (2, "3")])
    noisy = record(tmp_path / "noise", [(1, "5"), (2, "5")])
    generic = plans_of(undefended, BASE, most=1, model=toy_model).plans
    assert [name for name, _ in generic] == ["plain", "stronger image prior"]
    own = adapt(noisy, BASE, model=toy_model).plans
    found = plans_of(noisy, BASE, most=1, model=toy_model).plans
    assert found[:2] == own[:2]
    assert generic[1][1].adversary in [plan.adversary for _, plan in found]
    assert len(found) <= 3

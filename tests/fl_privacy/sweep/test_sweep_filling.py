"""Names in braces, points that change one thing, and what is done offline on a recording."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_privacy.component import ComponentError
from fl_privacy.sweep.filling import filled, places, settled, values_of
from fl_privacy.sweep.offline import Attack, Measure, node_of
from fl_privacy.sweep.reading import sweep_of
from fl_privacy.sweep.stages import cells_of
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthError, TruthVault

PIA: dict[str, Any] = {
    "adversary": "property_inference(property='{client-property}')",
    "own-partition": 1,
    "threat_model": {"auxiliary": "{auxiliary}"},
}


def document(**tables: Any) -> dict[str, Any]:
    """A sweep of one undefended point."""
    people = "celeba(path='/x.npz', main_task='{task}', properties=('{client-property}',))"
    return {
        "run": {"dataset": people, "client-property-schedule": "every:5"},
        "axes": {"task": ["Smiling"], "client_property": ["Male", "Young"]},
        "defenses": {"none": {}},
        "attacks": [PIA],
        **tables,
    }


def test_names_are_filled_in_and_others_stay() -> None:
    text = "npz(x='{x_split}', y='{split}', z='{batch_size}{lr}')"
    assert places(text) == {"x-split", "split", "batch-size", "lr"}
    values: dict[str, Any] = {"batch-size": 4, "lr": 0.1}
    assert filled(text, values) == "npz(x='{x_split}', y='{split}', z='40.1')"


def test_settings_are_filled_from_each_other_and_from_defaults() -> None:
    table: dict[str, Any] = {
        "dataset": "celeba(main_task='{task}', seed={seed})",
        "task": "Male",
        "seed": 3,
        "clients": 2,
        "model": "m{batch-size}",
    }
    assert settled(table) == {
        "dataset": "celeba(main_task='Male', seed=3)",
        "seed": 3,
        "clients": 2,
        "model": "m1",
    }
    values = values_of(table)
    assert (values["task"], values["clients"], values["lr"]) == ("Male", 2, 0.01)
    auxiliary = filled("{auxiliary}", values)
    assert auxiliary == "celeba(main_task='Male', held_out='auxiliary', seed=3)"


def test_auxiliary_people_are_those_of_a_dataset_that_has_some() -> None:
    with pytest.raises(ComponentError, match="digits has no setting held_out: write out"):
        filled("{auxiliary}", {"dataset": "digits"})


def test_attacks_and_measures_follow_the_axes(tmp_path: Path) -> None:
    measures = [{"auxiliary": "{auxiliary}", "metrics": ["v_information", "label_sensitivity"]}]
    cells = cells_of(sweep_of(document(measures=measures)), tmp_path)
    assert [cell.attacks[0].adversary for cell in cells] == [
        f"property_inference(property='{name}')" for name in ("Male", "Young")
    ]
    for cell, name in zip(cells, ("Male", "Young"), strict=True):
        record = cell.record
        assert record is not None
        assert record.settings["dataset"] == (
            f"celeba(path='/x.npz', main_task='Smiling', properties=('{name}',))"
        )
        assert "task" not in record.settings
        held = cell.attacks[0].threat_model.auxiliary
        assert {one.auxiliary for one in cell.measures} == {held}
        assert f"properties=('{name}',), held_out='auxiliary'" in held
        assert [one.metrics for one in cell.measures] == [
            ("v_information",),
            ("label_sensitivity",),
        ]
    answers = [cells[0].answer(attack) for attack in cells[0].attacks]
    answers += [cells[0].answer(measure) for measure in cells[0].measures]
    assert len(set(answers)) == 3


def test_one_at_a_time_changes_one_thing() -> None:
    noise = {"spec": "gaussian_noise(scale={strength})", "strengths": [1, 2]}
    axes = {"lr": [0.1, 0.2, 0.3], "clients": [2, 4]}
    tables = {"run": {}, "axes": axes, "defenses": {"none": {}, "noise": noise}, "train": {}}
    alone = sweep_of({**tables, "one-at-a-time": True}).points()
    assert len(sweep_of(tables).points()) == 3 * 2 * 3
    assert len(alone) == 1 + 2 + 1 + 2
    first = alone[0]
    assert (dict(first.axes), first.label) == ({"lr": 0.1, "clients": 2}, "none")
    assert sorted(point.changes(first) for point in alone) == [0] + [1] * 5


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"axes": {"tsk": ["Smiling"]}}, "tsk"),
        ({"axes": {"strength": [1]}}, "means something else"),
        ({"attacks": [{**PIA, "own_partition": -1}]}, "greater than or equal to 0"),
        ({"attacks": [{**PIA, "threat_model": {"own_node": "7"}}]}, "leave own_node out"),
        ({"attacks": [], "measures": [{"metrics": []}]}, "at least 1 item"),
        ({"measures": [{"metrics": ["v_information"], "audit": True, "auxiliary": "x"}]}, "both"),
        ({"measures": [{"metrics": ["v_information"] * 2}]}, "two .*measures"),
        ({"measures": [{"metric": ["v_information"]}]}, "did you mean 'metrics'"),
        ({"attacks": [], "record": {}, "train": {}}, r"add an \[\[attacks\]\] or \[\[measures\]\]"),
    ],
)
def test_refusals(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        sweep_of(document(**tables))


def test_what_settings_need_of_each_other_is_refused_at_the_point(tmp_path: Path) -> None:
    lacking = sweep_of(document(axes={"task": ["Smiling"]}))
    with pytest.raises(ComponentError, match="needs client-property"):
        cells_of(lacking, tmp_path)


def test_an_attack_from_outside_keeps_the_name_of_its_answer() -> None:
    """Answers that were written before an adversary could be a client are found again."""
    outside = Attack(adversary="analytic")
    assert "own_partition" not in outside.identity
    assert outside.model_copy(update={"own_partition": 0}).identity["own_partition"] == 0
    assert json.dumps(outside.identity)


def test_the_adversary_is_the_client_of_its_partition(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path / "truth")
    for partition, node in enumerate(("71", "8")):
        where: dict[str, Any] = {"attempt": 1, "round": 1, "node": node}
        vault.write_defense(**where, spec="", stats={"partition": partition})
    assert node_of(tmp_path, 1) == "8"
    attack = Attack(
        adversary="analytic", own_partition=0, threat_model=ThreatModel(unit="aggregate")
    )
    model = attack.plan(3, "cpu", tmp_path).threat_model
    assert (model.own_node, model.unit) == ("71", "aggregate")
    assert not Attack(adversary="analytic").plan(3, "cpu", tmp_path).threat_model.own_node
    with pytest.raises(TruthError, match=r"own_partition 2: no client .* there are: 0, 1"):
        node_of(tmp_path, 2)


def test_a_measure_is_the_plan_of_its_metrics() -> None:
    measure = Measure(metrics=("v_information",), audit=True, rounds="1-3", together=True, name="V")
    plan = measure.plan(5, "cpu")
    assert (plan.metrics, plan.audit, plan.rounds, plan.together) == (
        *(("v_information",), True, "1-3", True),
    )
    assert (plan.seed, plan.device) == (5, "cpu")
    assert "name" not in measure.identity

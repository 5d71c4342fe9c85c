"""The one data flow, its resumption, and that the truth never reaches an attack."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adversaries.analytic import Analytic
from adversaries.parts import PartError
from fl_privacy.analysis import analyze, execute, prepare
from fl_privacy.baseline_job import prepare_baseline
from fl_privacy.component import ComponentError, create, find, installed, spec_of
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.plan import AnalysisError, Plan, recording_digest, resolve_device
from fl_privacy.recording import Manifest, Recording, RecordingWriter
from fl_privacy.report.reading import read_run
from fl_privacy.results import ResultSet
from fl_privacy.testing import toy_model
from fl_privacy.testing.toys import TASK
from fl_privacy.threat_model import ThreatModel, ThreatModelError
from fl_privacy.truth import TruthVault
from fl_privacy.types import (
    Failure,
    Observation,
    PropertyScores,
    Reconstruction,
    Representations,
    Samples,
)

COUNT = 6
ATTACK = "gradient_similarity(iterations=5)"


def outputs(run: Path, plan: Plan) -> list[tuple[Tensor, Tensor, float]]:
    results = analyze(run, plan, model=toy_model)
    found = [results.reconstruction(row["key"]) for row in results.rows()]
    return [(r.inputs, r.labels, r.loss) for r in found if r] or representations(run, plan)


def representations(run: Path, plan: Plan) -> list[tuple[Tensor, Tensor, float]]:
    """The same of an adversary that infers no inputs, whose answers are not kept."""
    job = prepare(run, plan, model=toy_model)
    answers = job.adversary.attack(job.observations, seed=plan.seed, device=job.device)
    return [
        (torch.cat([rows.flatten() for rows in a.layers.values()]), a.classes, 0.0)
        if isinstance(a, Representations)
        else (a.scores, a.scores, 0.0)
        for a in answers
        if isinstance(a, Representations | PropertyScores)
    ]


def replace_truth_by_noise(run: Path) -> None:
    """Other pictures, and labels none of which is the true one."""
    shutil.rmtree(run / "truth")
    vault = TruthVault(run / "truth")
    for i, entry in enumerate(Recording(run / "recording").entries()):
        images = entry.num_examples or 0
        held = torch.arange(i * images, (i + 1) * images)
        noise = Samples(torch.rand(images, *TASK.input_shape), 3 - held % 4)
        vault.write(
            attempt=1, round=entry.round, node=entry.node, step=0, samples=noise, indices=held
        )


def same(a: list[tuple[Tensor, Tensor, float]], b: list[tuple[Tensor, Tensor, float]]) -> bool:
    return all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and str(x[2]) == str(y[2])
        for x, y in zip(a, b, strict=True)
    )


ONE_IMAGE = {"analytic", "representation", "rgap"}
"""Attacks that treat no target of several images."""


@pytest.mark.parametrize("unit", ["update", "batch", "aggregate"])
@pytest.mark.parametrize("name", sorted(installed("adversaries")))
def test_non_interference(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, unit: str
) -> None:
    run: Path = request.getfixturevalue("batches" if unit == "batch" else "run")
    plan = few_steps(name, unit, tmp_path)
    with_truth = outputs(run, plan)
    shutil.rmtree(run / "results")
    replace_truth_by_noise(run)
    with_noise = outputs(run, plan)
    shutil.rmtree(run / "results")
    shutil.rmtree(run / "truth")
    without = outputs(run, plan)
    attacked = {"update": COUNT, "batch": 3, "aggregate": 2}[unit]
    assert len(with_truth) == (0 if unit != "update" and name in ONE_IMAGE else attacked)
    assert same(with_truth, with_noise)
    assert same(with_truth, without)


def few_steps(name: str, unit: str, folder: Path) -> Plan:
    """A short attack of two restarts, of which one has to be chosen, by an adversary."""
    kind = find("adversaries", name)
    short: dict[str, object] = {
        n: 2 for n in ("iterations", "inner", "restarts") if n in kind.model_fields
    }
    if "batches" in kind.model_fields:
        short["batches"] = 10
    adversary = create("adversaries", name, short)
    known = (
        saved(folder / "own.npz", TASK.input_shape) if adversary.requires & {"auxiliary"} else ""
    )
    granted = ThreatModel(unit="aggregate" if unit == "aggregate" else "update", auxiliary=known)
    spec = spec_of("adversaries", adversary)
    return Plan(adversary=spec, threat_model=granted, metrics=("psnr",))


def test_an_oracle_acts_only_through_the_granted_labels(run: Path) -> None:
    inferred = outputs(run, Plan(adversary=ATTACK))
    told = Plan(adversary=ATTACK, threat_model=ThreatModel(labels="oracle"))
    assert same(outputs(run, told), inferred)  # the labels inferred at batch 1 are the true ones
    results = analyze(run, told, model=toy_model)
    assert results.config.oracle == ("labels",)
    assert {row["labels"] for row in results.rows()} == {"oracle"}
    shutil.rmtree(run / "results")
    replace_truth_by_noise(run)
    assert [labels.tolist() for _, labels, _ in outputs(run, told)] != [
        labels.tolist() for _, labels, _ in inferred
    ]


def test_rows_carry_scores_and_the_clients_defense(run: Path) -> None:
    results = analyze(run, Plan(adversary="analytic"), model=toy_model)
    rows = {row["node"]: row for row in results.rows()}
    assert all(row["psnr"] > 60 and row["label_accuracy"] == 1 for row in rows.values())
    assert [rows[str(i)]["defense"] for i in range(COUNT)] == [""] * 5 + [
        "gaussian_noise(scale=0.1)"
    ]
    assert results.config.complete
    assert (results.folder / "targets.csv").exists()


def test_without_truth_there_are_results_but_no_scores(run: Path) -> None:
    shutil.rmtree(run / "truth")
    results = analyze(run, Plan(adversary="analytic"), model=toy_model)
    assert all(row["psnr"] is None and row["defense"] is None for row in results.rows())
    assert all(results.reconstruction(row["key"]) for row in results.rows())


def test_a_truth_that_comes_later_scores_what_was_attacked_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a deployment, whose nodes keep the truth until an auditor copies it."""
    plan = Plan(adversary="analytic")
    at_once = [{**row, "seconds": 0} for row in analyze(run, plan, model=toy_model).rows()]
    shutil.rmtree(run / "results")
    (run / "truth").rename(run / "elsewhere")
    before = analyze(run, plan, model=toy_model)
    assert all(row["mse"] is None and row["defense"] is None for row in before.rows())
    (run / "elsewhere").rename(run / "truth")
    asked = list[int]()

    def attack(self: Analytic, observations: Sequence[Observation], **_: Any) -> Iterator[Any]:
        asked.append(len(observations))
        return iter(())

    monkeypatch.setattr(Analytic, "attack", attack)
    after = analyze(run, plan, model=toy_model)
    assert [{**row, "seconds": 0} for row in after.rows()] == at_once
    assert [row["mse"] for row in after.rows()] != [None] * len(at_once)
    assert ResultSet(after.folder).config.complete
    analyze(run, plan, model=toy_model)
    assert asked == [0, 0], "nothing is attacked anew"


def test_aggregates_are_scored_against_all_their_members(run: Path) -> None:
    plan = Plan(adversary="baseline", threat_model=ThreatModel(unit="aggregate"))
    results = analyze(run, plan, model=toy_model)
    assert [row["images"] for row in results.rows()] == [3, 3]
    assert all(row["psnr"] is not None for row in results.rows())


def test_an_oracle_tells_an_aggregate_the_labels_of_all_its_members(run: Path) -> None:
    told = ThreatModel(unit="aggregate", labels="oracle")
    job = prepare(run, Plan(adversary="baseline", threat_model=told), model=toy_model)
    labels = [o.labels for o in job.observations]
    assert [label.tolist() for label in labels if label is not None] == [[0, 1, 2], [3, 0, 1]]


def test_scores_are_taken_in_the_range_of_the_task(run: Path) -> None:
    plan = Plan(adversary="baseline", metrics=("mse",))
    wide = TASK.model_copy(update={"low": -9.0, "high": 1.0})
    narrow = analyze(run, plan, model=toy_model).rows()
    wider = analyze(run, plan, model=toy_model, task=wide).rows()
    assert [row["mse"] for row in wider] == pytest.approx([row["mse"] / 100 for row in narrow])


def test_what_decides_the_numbers_makes_another_analysis(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(adversary=ATTACK)
    first = prepare(run, plan, model=toy_model)
    assert first.config.settings["iterations"] == 5
    assert "restarts" in first.config.settings  # a default, which the spec leaves out
    assert first.config.task == TASK
    other = TASK.model_copy(update={"mean": (0.1,)})
    folders = {first.folder, prepare(run, plan, model=toy_model, task=other).folder}
    monkeypatch.setattr("fl_privacy.plan.code_digest", lambda: "changed")
    folders.add(prepare(run, plan, model=toy_model).folder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    folders.add(prepare(run, plan, model=toy_model).folder)
    assert len(folders) == 4


def test_equal_settings_in_one_second_are_two_recordings(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RecordingWriter.open(tmp_path / name, Manifest(created="now", task=TASK)).close()
    assert recording_digest(Recording(tmp_path / "a")) != recording_digest(
        Recording(tmp_path / "b")
    )
    manifest = tmp_path / "a" / "manifest.json"
    fields = json.loads(manifest.read_text())
    del fields["id"]  # as in a recording that is older than the field
    manifest.write_text(json.dumps(fields))
    digests = {recording_digest(Recording(tmp_path / "a")) for _ in range(2)}
    assert len(digests) == 1


def test_a_result_holds_the_targets_that_were_asked_for(run: Path) -> None:
    analyze(run, Plan(adversary="analytic", rounds="1"), model=toy_model)
    second = analyze(run, Plan(adversary="analytic", rounds="2"), model=toy_model)
    assert [row["round"] for row in second.rows()] == [2, 2, 2]
    assert len(ResultSet(second.folder).rows()) == COUNT


def test_rows_name_all_rounds_of_a_linked_target(
    tmp_path: Path, record: Callable[[Path, Sequence[tuple[int, str]]], Path]
) -> None:
    linked = record(tmp_path, [(1, "0"), (2, "0"), (3, "0")])
    plan = Plan(adversary="baseline", threat_model=ThreatModel(unit="client"), rounds="2-3")
    rows = analyze(linked, plan, model=toy_model).rows()
    assert [row["rounds"] for row in rows] == ["2,3"]
    truth_of = read_run(linked).truth_of
    assert truth_of is not None
    truth = truth_of(rows[0])
    assert truth is not None
    assert len(truth) == 2


def test_an_interrupted_analysis_goes_on_and_repeats_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Analytic.attack
    asked: list[str] = []

    def stops_once(
        self: Analytic, observations: Sequence[Observation], **context: Any
    ) -> Iterator[Reconstruction | Failure]:
        for result in whole(self, observations, **context):
            if len(asked) == 3 and len(observations) == COUNT:
                raise KeyboardInterrupt
            asked.append(result.key)
            yield result

    monkeypatch.setattr(Analytic, "attack", stops_once)
    with pytest.raises(KeyboardInterrupt):
        analyze(run, Plan(adversary="analytic"), model=toy_model)
    results = analyze(run, Plan(adversary="analytic"), model=toy_model)
    assert len(asked) == len(set(asked)) == COUNT
    assert {row["key"] for row in results.rows()} == set(asked)
    assert results.config.complete


def test_the_width_is_that_of_all_targets_and_stays(run: Path) -> None:
    first = analyze(run, Plan(adversary=ATTACK, targets=2), model=toy_model)
    more = analyze(run, Plan(adversary=ATTACK), model=toy_model)
    assert first.folder == more.folder
    assert first.config.width == more.config.width == COUNT  # not that of the first targets
    assert len(more.rows()) == COUNT


def test_going_on_keeps_the_width_however_little_memory_is_free(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = analyze(run, Plan(adversary=ATTACK, targets=2), model=toy_model)
    monkeypatch.setattr("adversaries.planning.free_memory", lambda _device: 0)
    assert analyze(run, Plan(adversary=ATTACK), model=toy_model).config.width == COUNT
    other = analyze(run, Plan(adversary=ATTACK, seed=1), model=toy_model)
    assert (first.config.width, other.config.width) == (COUNT, 1)


def test_refusals_come_before_any_work(run: Path) -> None:
    denied = ThreatModel(local_training=False)
    with pytest.raises(ThreatModelError, match="gradient_similarity needs local_training"):
        analyze(run, Plan(adversary=ATTACK, threat_model=denied), model=toy_model)
    with pytest.raises(ComponentError, match=r"no adversary 'gs'; installed: .*gradient_sim"):
        analyze(run, Plan(adversary="gs"), model=toy_model)
    with pytest.raises(ComponentError, match=r"iterations: .*greater than or equal to 1.*got 0"):
        analyze(run, Plan(adversary="gradient_similarity(iterations=0)"), model=toy_model)
    assert not (run / "results").exists()


def test_a_refusal_while_attacking_leaves_no_empty_analysis(run: Path) -> None:
    with pytest.raises(PartError, match="typo"):
        analyze(run, Plan(adversary="gradient_similarity(layers='typo')"), model=toy_model)
    assert not (run / "results").exists()


def test_an_error_keeps_what_was_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, whole = Plan(adversary="analytic"), Analytic.attack

    def fails(
        self: Analytic, observations: Sequence[Observation], **context: Any
    ) -> Iterator[Reconstruction | Failure]:
        yield next(whole(self, observations, **context))
        raise RuntimeError("broken")

    monkeypatch.setattr(Analytic, "attack", fails)
    job = prepare(run, plan, model=toy_model)
    with pytest.raises(RuntimeError, match="broken"):
        execute(job)
    assert len(ResultSet(job.folder).rows()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.flatten(1),
            rf"inputs of shape {re.escape(str(TASK.input_shape))} each, got \(\d+,\)",
        ),
        (lambda x: 255 * x, r"inputs in 0\.\.1, got .*before normalization"),
        (lambda x: x - 0.5, r"inputs in 0\.\.1, got -"),
        (lambda x: x * float("nan"), "inputs in .*got nan"),
    ],
)
def test_truth_that_the_task_does_not_describe_is_refused_before_the_attack(
    run: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    rewrite_first_truth(run, change)
    with pytest.raises(AnalysisError, match=f"truth of node 0 in round 1: expected {message}"):
        prepare(run, Plan(adversary="analytic"), model=toy_model)
    assert not (run / "results").exists()


def test_truth_that_a_hair_lies_outside_the_range_is_taken(run: Path) -> None:
    rewrite_first_truth(run, lambda x: x / x.max() * 1.0005)
    assert prepare(run, Plan(adversary="analytic"), model=toy_model)


def rewrite_first_truth(run: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Change the inputs that node 0 kept in round 1."""
    vault = TruthVault(run / "truth")
    first = ThreatModel().observe(Recording(run / "recording"), model=toy_model)[0]
    held = vault.samples(first.exchanges)
    changed = Samples(change(held.inputs), held.labels)
    index = torch.zeros(1)
    vault.write(attempt=1, round=1, node="0", step=0, samples=changed, indices=index)


def test_clients_that_say_nothing_of_a_defense_are_not_called_undefended(run: Path) -> None:
    for path in (run / "truth").rglob("defense.json"):
        path.unlink()
    rows = analyze(run, Plan(adversary="analytic"), model=toy_model).rows()
    assert all(row["psnr"] is not None and row["defense"] is None for row in rows)


def test_the_baseline_gets_the_run_s_own_data_set(run: Path, tmp_path: Path) -> None:
    path = held_as(run, tmp_path / "own.npz", TASK.input_shape)
    plan = Plan(adversary=ATTACK, threat_model=ThreatModel(labels="oracle"))
    job, weaker = prepare_baseline(run, plan, model=toy_model)
    assert job.config.name == "baseline"
    assert str(path) in str(job.config.threat_model["auxiliary"])
    assert job.config.threat_model["labels"] == "inferred"
    assert job.observations[0].auxiliary is not None
    assert weaker == ""


def held_as(run: Path, path: Path, shape: tuple[int, ...]) -> Path:
    """Make the manifest name a data set of sixteen inputs at ``path``."""
    renamed(run, dataset=saved(path, shape))
    return path


def saved(path: Path, shape: tuple[int, ...]) -> str:
    """A data set of sixteen inputs at ``path``, by the name under which it is found."""
    x, y = np.random.default_rng(0).random((16, *shape)), np.arange(16) % 4
    odd = np.arange(16) // 4 % 2  # not what the labels say
    np.savez(path, x_train=x, x_test=x, y_train=y, y_test=y, odd_train=odd, odd_test=odd)
    return f"npz(path={str(path)!r}, properties=('odd_{{split}}',))"


def renamed(run: Path, **changes: object) -> None:
    """Change the manifest of a recording."""
    manifest = run / "recording" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


@pytest.mark.parametrize("shape", [(1, 5, 5), None])
def test_a_data_set_that_cannot_be_used_here_leaves_a_constant_guess(
    run: Path, tmp_path: Path, shape: tuple[int, ...] | None
) -> None:
    path = held_as(run, tmp_path / "own.npz", shape or TASK.input_shape)
    if shape is None:
        path.unlink()
    job, weaker = prepare_baseline(run, Plan(adversary=ATTACK), model=toy_model)
    assert job.config.threat_model["auxiliary"] == ""
    assert "The baseline guesses a constant picture" in weaker
    assert "own.npz" in weaker
    assert len(execute(job).rows()) == COUNT
    granted = Plan(adversary=ATTACK, threat_model=ThreatModel(auxiliary=f"npz(path={str(path)!r})"))
    with pytest.raises((ThreatModelError, DatasetError), match=r"own\.npz"):
        prepare(run, granted, model=toy_model)


def test_devices_that_are_not_there() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(AnalysisError, match="expected auto, cpu"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(AnalysisError, match="not available"):
            resolve_device("cuda")

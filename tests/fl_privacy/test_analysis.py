"""The one data flow, its resumption, and that the truth never reaches an attack."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adversaries.analytic import Analytic
from fl_privacy.analysis import AnalysisError, Plan, analyze, baseline_plan, resolve_device
from fl_privacy.component import ComponentError
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.testing import toy_model, toy_samples
from fl_privacy.testing.toys import TASK, TRAINING
from fl_privacy.threat_model import ThreatModel, ThreatModelError
from fl_privacy.truth import TruthVault
from fl_privacy.types import Failure, Observation, Reconstruction, Samples

COUNT = 6
ATTACK = "gradient_similarity(iterations=5)"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An audited run of six clients, one image each; the last client is defended."""
    model, samples = toy_model(), toy_samples(COUNT)
    layout = Layout.of(model)
    manifest = Manifest(created="", model="mlp(hidden=(16,))", task=TASK, local_training=TRAINING)
    vault = TruthVault(tmp_path / "truth")
    with RecordingWriter.open(tmp_path / "recording", manifest) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in model.state_dict().items()}, layout)
        for i in range(COUNT):
            one = Samples(samples.inputs[i : i + 1], samples.labels[i : i + 1])
            loss = torch.nn.functional.cross_entropy(model(TASK.normalize(one.inputs)), one.labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            writer.append(
                round=1 + i // 3,
                node=str(i),
                arrays={
                    n: (p - TRAINING.lr * g).detach().numpy()
                    for (n, p), g in zip(model.named_parameters(), gradients, strict=True)
                },
                num_examples=1,
                global_digest=sent,
                layout=layout,
            )
            where = {"attempt": 1, "round": 1 + i // 3, "node": str(i)}
            vault.write(**where, step=0, samples=one, indices=torch.tensor([i]))  # type: ignore[arg-type]
            spec = "gaussian_noise(scale=0.1)" if i == COUNT - 1 else ""
            vault.write_defense(**where, spec=spec, stats={})  # type: ignore[arg-type]
    return tmp_path


def outputs(run: Path, plan: Plan) -> list[tuple[Tensor, Tensor, float]]:
    results = analyze(run, plan, model=toy_model)
    found = [results.reconstruction(row["key"]) for row in results.rows()]
    return [(r.inputs, r.labels, r.loss) for r in found if r]


def replace_truth_by_noise(run: Path) -> None:
    shutil.rmtree(run / "truth")
    vault = TruthVault(run / "truth")
    for i in range(COUNT):
        noise = Samples(torch.rand(1, *TASK.input_shape), torch.tensor([3 - i % 4]))
        vault.write(
            attempt=1,
            round=1 + i // 3,
            node=str(i),
            step=0,
            samples=noise,
            indices=torch.tensor([i]),
        )


def same(a: list[tuple[Tensor, Tensor, float]], b: list[tuple[Tensor, Tensor, float]]) -> bool:
    return all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and str(x[2]) == str(y[2])
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("adversary", [ATTACK, "analytic", "baseline"])
def test_non_interference(run: Path, adversary: str) -> None:
    plan = Plan(adversary=adversary)
    with_truth = outputs(run, plan)
    shutil.rmtree(run / "results")
    replace_truth_by_noise(run)
    with_noise = outputs(run, plan)
    shutil.rmtree(run / "results")
    shutil.rmtree(run / "truth")
    without = outputs(run, plan)
    assert len(with_truth) == COUNT
    assert same(with_truth, with_noise)
    assert same(with_truth, without)


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


def test_aggregates_are_scored_against_all_their_members(run: Path) -> None:
    plan = Plan(adversary="baseline", threat_model=ThreatModel(unit="aggregate"))
    results = analyze(run, plan, model=toy_model)
    assert [row["images"] for row in results.rows()] == [3, 3]
    assert all(row["psnr"] is not None for row in results.rows())


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


def test_going_on_uses_the_width_that_was_stored(run: Path) -> None:
    first = analyze(run, Plan(adversary=ATTACK, targets=2), model=toy_model)
    more = analyze(run, Plan(adversary=ATTACK), model=toy_model)
    assert first.folder == more.folder
    assert first.config.width == more.config.width == 2
    assert len(more.rows()) == COUNT


def test_refusals_come_before_any_work(run: Path) -> None:
    denied = ThreatModel(local_training=False)
    with pytest.raises(ThreatModelError, match="gradient_similarity needs local_training"):
        analyze(run, Plan(adversary=ATTACK, threat_model=denied), model=toy_model)
    with pytest.raises(ComponentError, match=r"no adversary 'gs'; installed: .*gradient_sim"):
        analyze(run, Plan(adversary="gs"), model=toy_model)
    with pytest.raises(ComponentError, match=r"iterations.*got 0.*Settings of.*restarts"):
        analyze(run, Plan(adversary="gradient_similarity(iterations=0)"), model=toy_model)
    assert not (run / "results").exists()


def test_the_baseline_gets_the_run_s_own_data_set(run: Path) -> None:
    recording = Recording(run / "recording")
    named = recording.manifest.model_copy(update={"dataset": "digits"})
    recording.manifest = named
    plan = Plan(adversary=ATTACK, threat_model=ThreatModel(labels="oracle"))
    baseline = baseline_plan(plan, recording)
    assert baseline.adversary == "baseline"
    assert baseline.threat_model.auxiliary == "digits"
    assert baseline.threat_model.labels == "inferred"


def test_devices_that_are_not_there() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(AnalysisError, match="expected auto, cpu"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(AnalysisError, match="not available"):
            resolve_device("cuda")

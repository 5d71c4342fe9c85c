"""``attack --adaptive`` from a recording to a table: who adapts to what, on whose updates."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fl_privacy import adaptive_attack
from fl_privacy.adaptive_command import adapt
from fl_privacy.component import create
from fl_privacy.left_out import read_left_out
from fl_privacy.plan import PLAIN, AnalysisError, Plan
from fl_privacy.results import load_results
from fl_privacy.testing import toy_model
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault

Record = Callable[[Path, Sequence[tuple[int, str]]], Path]
MODEL = "fl_privacy.testing:toy_model"
NOISE = "gaussian_noise(scale=0.1)"
BASE = Plan(adversary="gradient_similarity(iterations=3, width=4)")


@pytest.fixture
def rounds(tmp_path: Path, record: Record) -> Path:
    """An audited run of two clients in two rounds, of which client 5 adds noise."""
    return record(tmp_path, [(1, "4"), (1, "5"), (2, "4"), (2, "5")])


def names(run: Path, plan: Plan = BASE) -> list[str]:
    return [name for name, _ in adapt(run, plan, model=toy_model).plans]


def told(plan: Plan, **settings: object) -> Plan:
    return plan.model_copy(update={"threat_model": ThreatModel.model_validate(settings)})


def test_adaptations_are_about_the_clients_that_defend_themselves(rounds: Path) -> None:
    plans = dict(adapt(rounds, BASE, model=toy_model).plans)
    assert next(iter(plans)) == PLAIN
    assert plans.pop(PLAIN) == BASE
    assert set(plans) == {
        "likelihood",
        "stronger image prior",
        "early rounds",
        "stronger image prior and early rounds",
    }
    for name, plan in plans.items():
        assert plan.nodes == ("5",)
        assert plan.adaptation.startswith(f"{name}: ")
        assert plan.threat_model.defense == ("" if name == "early rounds" else NOISE)
        assert plan.rounds == ("1" if "early" in name else "")


def test_what_is_left_out_is_told(rounds: Path) -> None:
    skipped = dict(adapt(rounds, BASE, model=toy_model).skipped)
    assert "nothing but noise" in skipped["defense inside"]
    assert "another random batch" in skipped["rounds of one client"]


def test_the_threat_model_tells_the_defense_where_no_audit_does(rounds: Path) -> None:
    shutil.rmtree(rounds / "truth")
    with pytest.raises(AnalysisError, match=r'set defense = "DEFENSE" in the file of --threat'):
        adapt(rounds, BASE, model=toy_model)
    plans = dict(adapt(rounds, told(BASE, defense=NOISE), model=toy_model).plans)
    assert plans["likelihood"].nodes == ("4", "5")


def test_a_told_defense_is_looked_for_where_the_audit_wrote_it_down(rounds: Path) -> None:
    plans = dict(adapt(rounds, told(BASE, defense=NOISE), model=toy_model).plans)
    assert plans["likelihood"].nodes == ("5",)


def test_without_a_defense_there_is_nothing_to_adapt_to(tmp_path: Path, record: Record) -> None:
    run = record(tmp_path, [(1, "1"), (1, "2")])
    found = adapt(run, BASE, model=toy_model)
    assert [name for name, _ in found.plans] == [PLAIN]
    assert found.skipped == [
        ("adaptive attacks", "no target is defended, so there is nothing to adapt to")
    ]


def test_several_defenses_have_their_own_adaptations(rounds: Path) -> None:
    vault = TruthVault(rounds / "truth")
    for number in (1, 2):
        vault.write_defense(attempt=1, round=number, node="4", spec="top_k(k=9)", stats={})
    plans = dict(adapt(rounds, BASE, model=toy_model).plans)
    assert plans["surviving entries (top_k(k=9))"].nodes == ("4",)
    assert plans[f"likelihood ({NOISE})"].nodes == ("5",)


def test_the_noise_that_epsilon_chose_is_known_from_the_audit(rounds: Path) -> None:
    """By epsilon it is as if the noise had been named: its likelihood has the same scale."""
    scales: dict[str, Any] = {}
    for spec, chosen in (
        ("dp_sgd(noise_multiplier=0.5)", (None, None)),
        ("dp_sgd(epsilon=3.0)", (0.5, 0.5)),
        ("dp_sgd(epsilon=4.0)", (0.3, 0.4)),
        ("dp_sgd(epsilon=5.0)", (None, None)),
    ):
        vault = TruthVault(rounds / "truth")
        for number, noise in enumerate(chosen, start=1):
            stats = {} if noise is None else {"noise_multiplier": noise}
            vault.write_defense(attempt=1, round=number, node="5", spec=spec, stats=stats)
        found = adapt(rounds, BASE, model=toy_model)
        likelihood = dict(found.plans).get("likelihood")
        made = create("adversaries", likelihood.adversary) if likelihood else None
        scales[spec] = made.noise_scale if made else dict(found.skipped)["likelihood"]
        if likelihood and chosen[0]:
            told = create("defenses", likelihood.threat_model.defense)
            expected = math.sqrt((chosen[0] ** 2 + chosen[1] ** 2) / 2)
            assert told.noise_multiplier == pytest.approx(expected, rel=1e-5)
            assert told.epsilon == create("defenses", spec).epsilon
    named, by_epsilon, mixed, unknown = scales.values()
    assert named == by_epsilon
    assert mixed / named == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 2) / 0.5, rel=1e-5)
    assert "dp_sgd(epsilon=5.0, noise_multiplier=...)" in unknown


def test_a_client_that_changes_its_defense_is_left_out_in_words(rounds: Path) -> None:
    TruthVault(rounds / "truth").write_defense(attempt=1, round=2, node="5", spec="", stats={})
    found = adapt(rounds, BASE, model=toy_model)
    assert [name for name, _ in found.plans] == [PLAIN]
    assert found.skipped[0][0] == "node 5"


def test_a_client_of_no_aggregate_that_defends_alike_is_left_out_in_words(
    tmp_path: Path, record: Record
) -> None:
    """Client 4 defends itself in all it took part in, but its aggregate holds a client that does
    not in the next one: no target is left whose clients all have one defense."""
    run = record(tmp_path, [(1, "4"), (1, "5"), (2, "5"), (2, "6")])
    vault = TruthVault(run / "truth")
    vault.write_defense(attempt=1, round=1, node="4", spec=NOISE, stats={})
    found = adapt(run, told(BASE, unit="aggregate"), model=toy_model)
    assert [name for name, _ in found.plans] == [PLAIN]
    assert [name for name, _ in found.skipped] == ["node 4", "node 5", "node 6"]


def test_a_defense_that_is_not_installed_leaves_the_others_to_be_adapted_to(rounds: Path) -> None:
    vault = TruthVault(rounds / "truth")
    for number in (1, 2):
        vault.write_defense(attempt=1, round=number, node="4", spec="theirs(x=1)", stats={})
    found = adapt(rounds, BASE, model=toy_model)
    assert f"likelihood ({NOISE})" in dict(found.plans)
    (why,) = [why for name, why in found.skipped if name == "adapting to theirs(x=1)"]
    assert "theirs" in why
    assert "gaussian_noise" in why
    about = dict(adapt(rounds, told(BASE, defense=NOISE), model=toy_model).plans)
    assert about["likelihood"].nodes == ("5",)


def test_rounds_are_linked_where_they_hold_the_same_images(rounds: Path) -> None:
    manifest = rounds / "recording" / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["local_training"]["order"] = "sequential"
    manifest.write_text(json.dumps(fields))
    plans = dict(adapt(rounds, BASE, model=toy_model).plans)
    assert plans["rounds of one client"].threat_model.unit == "client"
    aggregates = told(BASE, unit="aggregate", defense=NOISE)
    skipped = dict(adapt(rounds, aggregates, model=toy_model).skipped)
    assert "aggregate" in skipped["rounds of one client"]


def shown(attacked: adaptive_attack.Attacked) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(adaptive_attack.strengths(attacked))
    return capture.get()


def test_all_are_run_once_and_ranked_beside_the_baseline(rounds: Path) -> None:
    attacked = adaptive_attack.attack_adaptively(rounds, BASE, model=MODEL)
    results = dict(attacked.results)
    assert next(iter(results)) == PLAIN
    assert list(results)[-1] == "baseline"
    assert {row["node"] for row in results["likelihood"].rows()} == {"5"}
    assert {row["node"] for row in results[PLAIN].rows()} == {"4", "5"}
    assert results["early rounds"].folder == results[PLAIN].folder  # what is known is not repeated
    assert results["likelihood"].config.threat_model["defense"] == NOISE
    assert results["likelihood"].config.adaptation.startswith("likelihood: ")
    reasons = dict(read_left_out(rounds)[BASE.adversary])
    assert "among those of plain, attacked alike" in reasons["early rounds"]
    assert "nothing but noise" in reasons["defense inside"]
    assert "likelihood" not in reasons
    text = shown(attacked)
    defended = text[text.index("Defended: ") :]
    means = [
        float(line.split("dB")[0].split()[-1].replace("−", "-"))
        for line in defended.splitlines()
        if " dB " in line and "mean" not in line
    ]
    assert len(means) == 6
    assert means == sorted(means, reverse=True)
    assert "likelihood [told]" in defended
    assert "plain [told]" not in defended
    assert "likelihood" not in text[: text.index("Defended: ")]
    before = {path: path.stat().st_mtime_ns for path in (rounds / "results").rglob("*.parquet")}
    again = adaptive_attack.attack_adaptively(rounds, BASE, model=MODEL)
    assert shown(again) == text
    assert len(load_results(rounds)) == 4  # plain, two adaptations, the baseline
    assert {path: path.stat().st_mtime_ns for path in before if "targets" not in path.name} == {
        path: stamp for path, stamp in before.items() if "targets" not in path.name
    }


def test_the_truth_tells_the_defense_and_nothing_else(rounds: Path) -> None:
    """Invariant 1: with noise for images and labels every reconstruction is byte-identical."""

    def answers() -> dict[str, list[torch.Tensor]]:
        found = {}
        for name, result in adaptive_attack.attack_adaptively(rounds, BASE, model=MODEL).results:
            made = [result.reconstruction(row["key"]) for row in result.rows()]
            found[name] = [one.inputs for one in made if one is not None]
        return found

    before = answers()
    shutil.rmtree(rounds / "results")
    for path in (rounds / "truth").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["inputs"] = torch.rand_like(tensors["inputs"])
        tensors["labels"] = (tensors["labels"] + 1) % 4
        save_file(tensors, path, metadata)
    after = answers()
    assert list(before) == list(after)
    for name, made in before.items():
        assert made
        assert all(torch.equal(a, b) for a, b in zip(made, after[name], strict=True))

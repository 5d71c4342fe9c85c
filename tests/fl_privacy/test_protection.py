"""fl-privacy protect: the layers to withhold, the files that do so, and the attacks repeated."""

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fl_privacy import analysis, cli
from fl_privacy.analysis import analyze
from fl_privacy.attack_command import read_threat_model
from fl_privacy.component import create_all
from fl_privacy.layer_results import MeasureConfig, Measurement, write_measurement
from fl_privacy.metrics.statistics import Interval
from fl_privacy.plan import Plan
from fl_privacy.prediction import LayerAuc
from fl_privacy.protect_command import Request, protect
from fl_privacy.protecting import (
    attacks_of,
    chosen,
    plan_without,
    random_sets,
    ranking_of,
    whole_update,
)
from fl_privacy.protection import ProtectionError, configuration, protections
from fl_privacy.report.scores import analyses
from fl_privacy.results import ResultSet, load_results
from fl_privacy.settings import parse_settings
from fl_privacy.testing import toy_model
from fl_privacy.testing.toys import TASK
from fl_privacy.threat_model import ThreatModel

MODEL = "fl_privacy.testing:toy_model"
LAYERS = ("1", "3")


def measured(values: Sequence[float] = (0.1, 0.9), name: str = "v_information") -> Measurement:
    config = MeasureConfig(
        metric=f"{name}(property='smiling')", name=name, settings={"property": "smiling"},
        needs="property", source="auxiliary", data="", data_digest="", samples=1,
        rounds=("1:1",), updates=1, targets_digest="", model="", task=TASK, threat_model={},
        seed=0, device="cpu", threads=1, recording_digest="", code_digest="", versions={},
    )  # fmt: skip
    return Measurement(config=config, unit="nats", layers=LAYERS, values=tuple(values), seconds=0.0)


def aucs(values: Sequence[float], layers: Sequence[str] = LAYERS) -> list[LayerAuc]:
    pairs = zip(layers, values, strict=True)
    return [LayerAuc("pia", "smiling", n, Interval(v, v, v, 9)) for n, v in pairs]


def test_the_attack_ranks_layers_where_there_is_one() -> None:
    held = [measured(), measured((0.3, 0.2), "subspace_distance")]
    assert ranking_of("", held, aucs((0.9, 0.6))).order == (("1", 0.9), ("3", 0.6))
    by = ranking_of("v_information", held, aucs((0.9, 0.6)))
    assert (by.by, by.unit, by.order) == ("v_information", "nats", (("3", 0.9), ("1", 0.1)))
    assert ranking_of("", held[:1], []).by == "v_information"


def test_several_measurements_of_a_metric_are_averaged() -> None:
    by = ranking_of("v_information", [measured((0.0, 0.2)), measured((1.0, 0.4))], [])
    assert dict(by.order) == pytest.approx({"1": 0.5, "3": 0.3})
    more = aucs((0.9, 0.6)) + aucs((0.5,), ("3",))
    assert dict(ranking_of("auc", [], more).order) == pytest.approx({"1": 0.9, "3": 0.55})


@pytest.mark.parametrize("by", ["", "auc", "nope"])
def test_what_ranks_nothing_is_refused_with_what_there_is(by: str) -> None:
    held = [measured(), measured((0.3, 0.2), "subspace_distance")]
    with pytest.raises(ProtectionError, match=r"subspace_distance.*; v_information"):
        ranking_of(by, held, [])
    with pytest.raises(ProtectionError, match="fl-privacy measure"):
        ranking_of(by, [], [])


def test_a_budget_leaves_a_layer() -> None:
    ranking = ranking_of("", [measured()], [])
    assert chosen(ranking, 1) == ("3",)
    for budget in (0, 2, 5):
        with pytest.raises(ProtectionError, match="a budget of 1 to 1 layers"):
            chosen(ranking, budget)


def test_random_layers_are_drawn_alike_and_each_layer_as_often() -> None:
    layers = [f"layer{i}" for i in range(6)]
    sets = random_sets(layers, 2, 300, seed=1)
    assert sets == random_sets(layers, 2, 300, seed=1) != random_sets(layers, 2, 300, seed=2)
    assert sets[:50] == random_sets(layers, 2, 50, seed=1)  # more draws change none of the first
    assert all(len(set(own)) == 2 for own in sets)
    often = [sum(layer in own for own in sets) for layer in layers]
    assert min(often) > 60  # of 100, with a standard deviation of 8
    assert max(often) < 140


def test_the_files_configure_clients_and_server(tmp_path: Path) -> None:
    known = ThreatModel(auxiliary="npz(path='/x.npz')", withheld=("3.bias",), unit="client")
    files = configuration(("1", "3"), known)
    settings = parse_settings(tomllib.loads(files["client-defense.toml"]))
    (defense,) = create_all("defenses", settings.client_defense)
    assert defense.layers == ("1", "3")
    (tmp_path / "t.toml").write_text(files["threat-model.toml"])
    held = read_threat_model(tmp_path / "t.toml")
    assert held == known.model_copy(update={"withheld": ("3.bias", "1", "3")})


def test_property_inference_looks_at_all_that_is_left() -> None:
    assert whole_update("property_inference(layers='each', batches=12)", 0) == (
        "property_inference(batches=12)"
    )
    attack = whole_update("gradient_similarity(iterations=2)", 6)
    assert attack == "gradient_similarity(iterations=2, width=6)"


@pytest.fixture
def attacked(run: Path) -> Path:
    """A run that an attack by a few steps was made on, and measured."""
    plan = Plan(adversary="gradient_similarity(iterations=2)", metrics=("psnr", "label_accuracy"))
    analyze(run, plan, model=toy_model, model_name=MODEL)
    write_measurement(run, measured())
    return run


def test_attacks_are_repeated_without_the_layers(attacked: Path) -> None:
    before = {path: path.read_bytes() for path in (attacked / "results").rglob("*.parquet")}
    found, folder = protect(attacked, Request(budget=1, repeats=3), model=MODEL)
    assert found.layers == ("3",)
    assert found.defense == "withhold(layers=('3',))"
    assert len(found.sets) == 3
    undefended = [c for c in found.comparisons if c.adversary.endswith("undefended")]
    assert [c.metric.name for c in undefended] == ["psnr", "label_accuracy"]
    assert (undefended[0].nothing.n, undefended[0].chosen.n, undefended[0].random.n) == (5, 5, 3)
    # labels are read off the last layer, which the server no longer sees
    assert undefended[1].nothing.mean == 1
    assert undefended[1].chosen.mean < 1
    hidden = {
        tuple(r.config.threat_model["withheld"])  # type: ignore[arg-type]
        for r in repeated(attacked)
    }
    assert hidden == {("3",), *found.sets}
    assert before == {p: p.read_bytes() for p in (attacked / "results").rglob("*.parquet")}
    assert {p.name for p in folder.iterdir()} == {
        "protection.json", "client-defense.toml", "threat-model.toml",
    }  # fmt: skip
    assert [held.model_dump_json() for held in protections(attacked)] == [found.model_dump_json()]


def repeated(run: Path) -> list[ResultSet]:
    return [ResultSet(p.parent) for p in (run / "protection" / "results").glob("*/config.json")]


def test_what_withholding_a_layer_gives_is_what_attacking_without_it_gives(attacked: Path) -> None:
    found, _ = protect(attacked, Request(budget=1, repeats=2), model=MODEL)
    own = analyses(load_results(attacked))[0]
    plan = plan_without(own, found.layers)
    by_hand = analyze(attacked, plan, model=toy_model, model_name=MODEL)
    (same,) = [r for r in repeated(attacked) if r.config.identity() == by_hand.config.identity()]
    assert [row["psnr"] for row in same.rows()] == [row["psnr"] for row in by_hand.rows()]


def test_nothing_is_attacked_twice(attacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = protect(attacked, Request(budget=1, repeats=3), model=MODEL)
    treated: list[int] = []

    def count(writer: Any, observations: Sequence[Any], *_: Any) -> None:
        treated.append(len(observations))

    monkeypatch.setattr(analysis, "write_results", count)
    again, _ = protect(attacked, Request(budget=1, repeats=3), model=MODEL)
    assert set(treated) == {0}
    apart = {"created"}
    assert again.model_dump_json(exclude=apart) == first.model_dump_json(exclude=apart)


def test_only_plain_attacks_that_saw_every_layer_are_repeated(attacked: Path) -> None:
    plain = analyses(load_results(attacked))
    hidden = Plan(
        adversary="gradient_similarity(iterations=2)", threat_model=ThreatModel(withheld=("1",))
    )
    analyze(attacked, hidden, model=toy_model, model_name=MODEL)
    guess = Plan(adversary="baseline")
    analyze(attacked, guess, model=toy_model, model_name=MODEL)
    every = analyses(load_results(attacked))
    assert len(every) == 3
    assert [a.config for a in attacks_of(every)] == [a.config for a in plain]


def test_without_attacks_only_the_configuration_is_written(attacked: Path) -> None:
    found, folder = protect(attacked, Request(budget=1, attack=False), model=MODEL)
    assert not found.comparisons
    assert not repeated(attacked)
    assert (folder / "threat-model.toml").read_text() == 'withheld = ["3"]\n'


def test_the_command_names_layers_and_scores(
    attacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["protect", str(attacked), "-k", "1", "--random", "2", "--model", MODEL]
    monkeypatch.setattr(sys, "argv", ["fl-privacy", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()][3:5] == [
        ["3", "0.9", "withhold"],
        ["1", "0.1"],
    ]
    assert "PSNR" in out
    assert "undefended" in out
    held = json.loads(next((attacked / "protection").glob("*/protection.json")).read_text())
    assert held["sets"] == [list(s) for s in random_sets(("3", "1"), 1, 2, 0)]

"""fl-privacy protect: the layers to withhold, the files that do so, and the attacks repeated."""

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from fl_privacy import analysis, cli
from fl_privacy.analysis import analyze
from fl_privacy.attack_command import read_threat_model
from fl_privacy.component import create_all
from fl_privacy.layer_ranking import chosen, random_sets, ranking_of
from fl_privacy.layer_results import MeasureConfig, Measurement, write_measurement
from fl_privacy.metrics.statistics import Interval
from fl_privacy.plan import Plan
from fl_privacy.prediction import LayerAuc
from fl_privacy.protect_command import Request, protect
from fl_privacy.protecting import attacks_of, better, plan_without, whole_update
from fl_privacy.protection import ProtectionError, configuration, protections
from fl_privacy.report.scores import analyses
from fl_privacy.results import MetricInfo, ResultSet, load_results
from fl_privacy.results_format import HAS_PROPERTY
from fl_privacy.settings import parse_settings
from fl_privacy.testing import toy_model
from fl_privacy.testing.toys import TASK
from fl_privacy.threat_model import ThreatModel

MODEL = "fl_privacy.testing:toy_model"
LAYERS = ("1", "3")


def measured(
    values: Sequence[float] = (0.1, 0.9), name: str = "v_information", **changed: Any
) -> Measurement:
    config = MeasureConfig(
        metric=f"{name}(property='smiling')", name=name, settings={"property": "smiling"},
        needs="property", source="auxiliary", data="", data_digest="", samples=1,
        rounds=("1:1",), updates=1, targets_digest="", model="", task=TASK, threat_model={},
        seed=0, device="cpu", threads=1, recording_digest="", code_digest="", versions={},
    )  # fmt: skip
    created = changed.pop("created", "2026-01-01")
    return Measurement(
        config=config.model_copy(update=changed),
        unit="nats",
        layers=LAYERS,
        values=tuple(values),
        seconds=0.0,
        created=created,
    )


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
    held = [measured((0.0, 0.2)), measured((1.0, 0.4), seed=1)]
    by = ranking_of("v_information", held, [])
    assert dict(by.order) == pytest.approx({"1": 0.5, "3": 0.3})
    assert [text.partition(": ")[2] for text in by.averaged] == [
        "v information of smiling, round 1, seed 0",
        "v information of smiling, round 1, seed 1",
    ]
    one = ranking_of(held[1].config.file_name.removesuffix(".json"), held, [])
    assert dict(one.order) == {"1": 1.0, "3": 0.4}
    assert one.averaged == by.averaged[1:]
    more = aucs((0.9, 0.6)) + aucs((0.5,), ("3",))
    assert dict(ranking_of("auc", [], more).order) == pytest.approx({"1": 0.9, "3": 0.55})


def test_what_other_code_measured_before_is_not_averaged_in() -> None:
    old = measured((0.0, 0.2), code_digest="a", created="2026-01-01")
    new = measured((1.0, 0.4), code_digest="b", created="2026-01-02")
    for held in ([old, new], [new, old]):
        assert dict(ranking_of("", held, []).order) == {"1": 1.0, "3": 0.4}


def test_the_clients_own_samples_and_others_are_not_averaged() -> None:
    held = [measured(), measured((0.2, 0.3), source="audit")]
    with pytest.raises(ProtectionError, match=r"cannot be averaged .*auxiliary.*; .*clients' own"):
        ranking_of("v_information", held, [])
    (name,) = (m.config.file_name.removesuffix(".json") for m in held[1:])
    assert ranking_of(name, held, []).source == "audit"


def test_layers_without_a_number_are_named() -> None:
    ranking = ranking_of("", [measured((0.1, float("nan")))], [])
    assert ranking.order == (("1", 0.1),)
    assert ranking.unranked == ("3",)
    assert ranking_of("", [measured()], aucs((0.7,), ("3",))).unranked == ("1",)


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


def test_random_layers_are_all_different_and_none_is_the_choice() -> None:
    layers = [f"layer{i}" for i in range(20)]
    sets = random_sets(layers, 2, 150, seed=1)
    assert sets == random_sets(layers, 2, 150, seed=1) != random_sets(layers, 2, 150, seed=2)
    assert sets[:50] == random_sets(layers, 2, 50, seed=1)  # more draws change none of the first
    assert len(set(sets)) == 150
    assert ("layer0", "layer1") not in sets
    assert all(len(set(own)) == 2 for own in sets)
    often = [sum(layer in own for own in sets) for layer in layers]
    assert min(often) >= 5  # of 15, with a standard deviation of 2.7
    assert max(often) <= 25


def test_where_there_are_few_all_other_sets_are_taken() -> None:
    sets = random_sets(("a", "b", "c"), 2, 5, seed=0)
    assert set(sets) == {("a", "c"), ("b", "c")}
    assert random_sets(("a", "b"), 1, 5, seed=0) == (("b",),)


PSNR = MetricInfo(name="psnr", unit="dB", higher_is_leakier=True)
MSE = MetricInfo(name="mse", unit="1", higher_is_leakier=False)
TOLD = MetricInfo(name="auc", unit="share of pairs", higher_is_leakier=True, set_level=True)


def rows(name: str, values: Sequence[float | None]) -> list[dict[str, Any]]:
    return [{"key": str(i), "node": str(i), name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(("metric", "sign"), [(PSNR, 1), (MSE, -1)])
def test_the_choice_is_compared_with_random_layers_target_by_target(
    metric: MetricInfo, sign: int
) -> None:
    own = [10.0, 30.0, 20.0, None]
    others = [[v + 2 if v else 5.0 for v in own], [v + 4 if v else 5.0 for v in own]]
    found = better(rows(metric.name, own), [rows(metric.name, o) for o in others], metric)
    # targets differ by tens, the two ways of withholding by 3 on each
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((sign * 3,) * 3 + (3,))


def test_aucs_are_compared_on_the_same_updates() -> None:
    has = [1, 1, 1, 0, 0, 0, 1, 0]
    first = [0.9, 0.2, 0.6, 0.5, 0.3, 0.1, 0.4, 0.7]
    second = [0.9, 0.8, 0.6, 0.5, 0.3, 0.1, 0.4, 0.7]
    third = [0.1, 0.9, 0.8, 0.2, 0.3, 0.6, 0.7, 0.4]

    def cells(scores: Sequence[float]) -> list[dict[str, Any]]:
        found = rows("auc", list(scores))
        return [
            {**r, "auc": str(r["auc"]), HAS_PROPERTY: str(h)}
            for r, h in zip(found, has, strict=True)
        ]

    lost = better(cells(first), [cells(second), cells(third)], TOLD)
    mean = (roc_auc_score(has, second) + roc_auc_score(has, third)) / 2
    assert lost.mean == pytest.approx(mean - roc_auc_score(has, first))
    assert lost.low < lost.mean < lost.high
    assert lost.n == 8
    failed = [{**row, "auc": None} if row["key"] == "1" else row for row in cells(second)]
    assert better(cells(first), [failed, cells(third)], TOLD).n == 7
    same = better(cells(first), [cells(first)], TOLD)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


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
    assert found.sets == (("1",),)  # the only other one
    assert found.every_set
    assert [name.partition("-")[0] for name in found.averaged] == ["v_information"]
    assert found.source == "auxiliary"
    undefended = [c for c in found.comparisons if c.adversary.endswith("undefended")]
    assert [c.metric.name for c in undefended] == ["psnr", "label_accuracy"]
    assert (undefended[0].nothing.n, undefended[0].chosen.n, undefended[0].random.n) == (5, 5, 1)
    for line in undefended:
        apart = line.random.mean - line.chosen.mean
        assert line.better.mean == pytest.approx(apart)
        assert line.better.low <= line.better.mean <= line.better.high
        assert line.better.n == 5
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

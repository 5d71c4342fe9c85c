"""Who is the strongest: rivals of one threat model, on the same clients, picked by their means."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from html import unescape
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_privacy.report import words, write_report
from fl_privacy.report.analyses import Analysis, analyses, names
from fl_privacy.report.contest import Contest, contests
from fl_privacy.report.reading import read_run
from fl_privacy.results import MetricInfo, ResultConfig, load_results
from fl_privacy.threat_model import ThreatModel

MakeRun = Callable[..., Any]
PSNR = MetricInfo(name="psnr", unit="dB", higher_is_leakier=True)
NOISE = "gaussian_noise(scale=0.1)"


def attack(
    label: str,
    scored: Mapping[str, float | None],
    *,
    adaptation: str = "",
    metric: MetricInfo = PSNR,
    **model: Any,
) -> Analysis:
    """An attack on one group; ``scored`` maps ``node`` or ``node/round`` to the metric."""
    config = ResultConfig(
        name=label,
        adversary=label,
        threat_model=ThreatModel(**model).model_dump(mode="json"),
        seed=0,
        device="cpu",
        width=1,
        recording_digest="",
        metrics=(metric,),
        oracle=ThreatModel(**model).oracles,
        adaptation=adaptation,
    )
    rows = [
        {
            "key": f"{model.get('unit')}{place}",
            "attempt": 1,
            "round": 1,
            "node": place.partition("/")[0],
            "defense": NOISE,
            metric.name: value,
        }
        for place, value in scored.items()
    ]
    return Analysis(label, (), config, rows)


def only(*found: Analysis, metric: str = "psnr") -> Contest:
    (contest,) = contests(found, NOISE, metric)
    return contest


def order(contest: Contest) -> list[str]:
    return [line.analysis.label for line in contest.lines]


def test_the_mean_over_the_same_clients_decides_not_a_lucky_target() -> None:
    steady, lucky = attack("steady", {"a": 10, "b": 10}), attack("lucky", {"a": 18, "b": 1})
    contest = only(lucky, steady)
    assert order(contest) == ["steady", "lucky"]
    assert contest.clients == 2
    mse = MetricInfo(name="mse", unit="squared", higher_is_leakier=False)
    lower = [attack("close", {"a": 0.1}, metric=mse), attack("far", {"a": 0.3}, metric=mse)]
    assert order(only(*lower, metric="mse")) == ["close", "far"]


def test_an_attack_that_failed_on_the_hard_targets_is_not_stronger_for_it() -> None:
    whole = attack("whole", {"a": 30, "b": 20, "c": 5, "d": 5})
    failing = attack("failing", {"a": 29, "b": 19, "c": None, "d": None})
    contest = only(failing, whole)
    assert order(contest) == ["whole", "failing"]  # over a and b
    assert contest.clients == 2
    quick = attack("quick", {"a": 90})
    contest = only(quick, whole)
    assert order(contest) == ["whole"]
    assert contest.clients == 4
    assert [line.analysis.label for line in contest.partial] == ["quick"]
    assert "1 more scored too few" in words.rank(contest)
    assert contests([attack("nothing", {"a": None})], NOISE, "psnr") == []


def test_linked_rounds_are_compared_client_by_client() -> None:
    single = attack("single", {"a/1": 10, "a/2": 20, "b/1": 30, "b/2": 30})
    linked = attack("linked", {"a": 16, "b": 30}, unit="client", adaptation="linked: why")
    contest = only(single, linked)
    assert order(contest) == ["linked", "single"]
    assert contest.clients == 2


def test_threat_models_are_not_mixed_but_knowing_the_defense_is_no_other_one() -> None:
    plain = attack("plain", {"a": 10})
    told = attack("told", {"a": 15}, defense=NOISE, adaptation="surviving entries: why")
    rich = attack("rich", {"a": 50}, auxiliary="digits")
    mean = attack("mean", {"a+b": 60}, unit="aggregate")
    found = contests([plain, told, rich, mean], NOISE, "psnr")
    assert sorted(order(contest) for contest in found) == [["mean"], ["rich"], ["told", "plain"]]
    (contest,) = [one for one in found if len(one.lines) == 2]
    assert contest.plain is not None
    assert contest.adaptive is not None
    assert contest.plain.analysis is plain
    assert contest.adaptive.analysis is told
    assert "the strongest of 2 attacks by its mean over 1 client, told the defense" in words.rank(
        contest
    )
    titles = {words.contest_title(one, len(found)) for one in found}
    assert len(titles) == len(found)


def test_one_with_an_oracle_competes_only_where_there_is_no_other() -> None:
    oracle = attack("oracle", {"a": 50}, labels="oracle")
    contest = only(oracle, attack("honest", {"a": 10}))
    assert order(contest) == ["honest"]
    assert "the only attack without an oracle" in words.rank(contest)
    assert "ORACLE: told the true labels" in words.rank(only(oracle))


def exact(i: int, target: Any) -> Tensor:
    inputs: Tensor = target.truth.inputs
    return inputs


def gray(i: int, target: Any) -> Tensor:
    return torch.full_like(target.truth.inputs, 0.4)


def page_of(run: Any) -> str:
    text = write_report(run.path).read_text(encoding="utf-8")
    return " ".join(re.sub("<[^>]*>", " ", unescape(text)).split())


def test_plain_and_adaptive_stand_side_by_side_and_the_told_one_is_marked(
    synthetic_run: MakeRun,
) -> None:
    run = synthetic_run(rounds=1)
    run.add_results("gradient_similarity", gray)
    run.add_results("baseline", gray)
    before = page_of(run)
    assert before.count("No attack on these clients knew the defense") == 1
    assert "told the defense" not in before
    whole = run.targets
    run.targets = [target for target in whole if target.defense]
    run.add_results(
        "gradient_similarity",
        exact,
        adversary="gradient_similarity(nonzero=True)",
        told=NOISE,
        adaptation="surviving entries: They are seen [Bal].",
    )
    after = page_of(run)
    assert "No attack on these clients knew the defense" not in after
    assert "plain attack" in after
    assert "100.0 dB adaptive attack" in after
    assert "the strongest of 2 attacks by its mean over 2 clients, told the defense" in after
    assert "gradient_similarity, surviving entries told the defense" in after
    assert f"told of the defense {NOISE}; it adapted to the clients' defense: surviving" in after
    assert "picked after the fact" in after
    nodes = sorted(target.node for target in run.targets)
    commands = re.findall(r"fl-privacy attack .*? (?=fl-privacy|printf)", after)
    (repeat,) = [shlex.split(c) for c in commands if "nonzero=True" in c]
    given = [repeat[i + 1] for i, part in enumerate(repeat) if part == "--node"]
    assert given == nodes
    assert "--targets" not in repeat


def test_scores_of_one_attack_are_brought_together(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", exact, metrics=("psnr",))
    run.add_results("gradient_similarity", exact, metrics=("psnr", "ssim"))
    whole = run.targets
    run.targets = whole[:3]
    run.add_results("gradient_similarity", exact, metrics=("mse",))
    (found,) = analyses(load_results(run.path))
    assert {metric.name for metric in found.config.metrics} == {"psnr", "ssim", "mse"}
    assert len(found.rows) == len(whole)
    assert sum(row["mse"] is not None for row in found.rows) == 3
    assert all(row["psnr"] is not None for row in found.rows)
    assert all(found.reconstruction(target.key) is not None for target in whole)


def test_metrics_of_one_name_and_other_settings_stay_apart(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", exact, metrics=("psnr",))
    folder = run.add_results("gradient_similarity", exact, metrics=("psnr", "ssim"))
    config = json.loads((folder / "config.json").read_text())
    config["metrics"][0]["spec"] = "psnr(cap=60)"
    (folder / "config.json").write_text(json.dumps(config))
    assert len(analyses(load_results(run.path))) == 2


def test_a_score_that_one_baseline_alone_has_is_compared_to_that(synthetic_run: MakeRun) -> None:
    run = synthetic_run(defense="")
    run.add_results("gradient_similarity", exact)
    run.add_results("baseline", gray, metrics=("psnr",))
    constant = {"adversary": "baseline(guess='constant')", "settings": {"guess": "constant"}}
    run.add_results("baseline", gray, metrics=("ssim", "mse"), **constant)
    (contest,) = contests(read_run(run.path).analyses, "", "ssim")
    assert contest.best.gain is not None
    assert contest.best.gain.n == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {"adaptation": "likelihood: why"}], ["a", "a, likelihood"]),
        ([{}, {"unit": "client"}], ["a", "a, linked rounds"]),
        ([{}, {"adversary": "a(x=1)"}], ["a", "a(x=1)"]),
        ([{}, {}], ["first", "second"]),
    ],
)
def test_names_tell_apart_by_what_differs(
    changes: list[dict[str, str]], expected: list[str]
) -> None:
    configs = []
    for change in changes:
        unit = change.get("unit", "update")
        config = attack("a", {}, adaptation=change.get("adaptation", ""), unit=unit).config
        configs.append(config.model_copy(update={"adversary": change.get("adversary", "a")}))
    found = names(configs, ["first", "second"])
    assert found[1] == expected[1]
    assert len(set(found)) == 2

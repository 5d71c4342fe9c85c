"""What the terminal says of an attack, and what is refused before one starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fl_privacy import attack_command
from fl_privacy.attack_progress import attack_progress
from fl_privacy.plan import AnalysisError, Plan
from fl_privacy.report import words
from fl_privacy.report.scores import analyses, score
from fl_privacy.results import ResultSet, load_results
from fl_privacy.testing.toys import TASK
from fl_privacy.threat_model import ThreatModel

MODEL = "fl_privacy.testing:toy_model"
ANALYTIC = Plan(adversary="analytic")


def attacked(run: Path, plan: Plan = ANALYTIC) -> tuple[ResultSet, ResultSet]:
    return attack_command.attack(run, plan, model=MODEL)


def shown(*results: ResultSet) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(attack_command.scores(results))
    return capture.get()


def test_a_number_has_the_report_s_interval_and_the_n_that_was_scored(run: Path) -> None:
    result, _ = attacked(run)
    (labels,) = [m for m in result.config.metrics if m.name == "label_accuracy"]
    line = score(analyses([result])[0], "", labels, None)
    assert line.interval.n == 5
    assert line.interval.low < 0.7 < line.interval.mean == 1.0  # Wilson's: not certain
    said = words.interval(line.interval, labels).replace(words.NBSP, " ")
    text = shown(result)
    assert all(part in text for part in (*said.replace("[", "|[").split("|"), "n 5"))
    assert attack_command.no_scores(result) == ""


def test_groups_are_named_as_in_the_report(run: Path) -> None:
    text = shown(*attacked(run))
    assert "Undefended" in text
    assert "Defended: gaussian_noise(scale=0.1)" in text


def test_without_truth_it_is_said_why_there_are_no_scores(run: Path) -> None:
    shutil.rmtree(run / "truth")
    result, baseline = attacked(run)
    assert "Defense unknown" in shown(result, baseline)
    assert "ndefended" not in shown(result, baseline)
    assert "audit=true" in attack_command.no_scores(result)


def test_only_the_targets_of_the_plan_are_shown(run: Path) -> None:
    attacked(run, ANALYTIC.model_copy(update={"rounds": "1"}))
    again = attacked(run, ANALYTIC.model_copy(update={"rounds": "2"}))
    assert [{row["round"] for row in result.rows()} for result in again] == [{2}, {2}]
    assert "n 2" in shown(again[0])


def test_a_missing_data_set_is_told_before_the_attack_and_leaves_a_weaker_guess(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run / "recording" / "manifest.json"
    gone = {"dataset": f"npz(path={str(run / 'gone.npz')!r})"}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **gone}))
    result, baseline = attacked(run)
    assert len(result.rows()) == len(baseline.rows()) == 6
    assert "constant picture" in capsys.readouterr().err
    assert baseline.config.threat_model["auxiliary"] == ""


def test_without_a_data_set_it_is_said_once_that_the_baseline_is_weak(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    attacked(run)
    assert capsys.readouterr().err.count("constant picture, which flatters the attack") == 1
    path = tmp_path / "own.npz"
    x, y = np.random.default_rng(0).random((16, *TASK.input_shape)), np.arange(16) % 4
    np.savez(path, x_train=x, x_test=x, y_train=y, y_test=y)
    known = ThreatModel(auxiliary=f"npz(path={str(path)!r})")
    _, baseline = attacked(run, ANALYTIC.model_copy(update={"threat_model": known}))
    assert "flatters" not in capsys.readouterr().err
    assert baseline.config.threat_model["auxiliary"] == known.auxiliary


def test_nothing_is_attacked_when_the_baseline_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AnalysisError("no")

    monkeypatch.setattr(attack_command, "prepare_baseline", refuse)
    with pytest.raises(AnalysisError):
        attacked(run)
    assert load_results(run) == []


def test_text_of_others_does_not_steer_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with attack_progress("evil\x1b]0;title\x07[/red]") as progress:
        progress(1, 1)
    assert "\x1b]0" not in capsys.readouterr().err
    result, _ = attacked(run)
    (group,) = {row["defense"] for row in result.rows() if row["defense"]}
    assert group in shown(result)


def test_a_run_elsewhere_is_refused_with_what_to_do() -> None:
    with pytest.raises(AnalysisError, match=r"local run folder, got s3://.*copy it to RUN"):
        attack_command.local_folder("s3://bucket/run")
    assert attack_command.local_folder("runs/first") == Path("runs/first")

"""A sweep goes on where it stopped, repeats nothing and loses nothing."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_privacy.component import ComponentError
from fl_privacy.sweep import command
from fl_privacy.sweep.command import Request, execute
from fl_privacy.sweep.live import Board
from fl_privacy.sweep.reading import SweepError
from fl_privacy.sweep.results import measure
from fl_privacy.sweep.running import locked, pending, run_sweep
from fl_privacy.sweep.stages import cells_of
from fl_privacy.sweep.table import csv_text

POINTS = 4


def run(request: Request, tools: Any) -> dict[str, str]:
    """The sweep without its page."""
    _, cells = request.read()
    wanted = request.wanted(cells)
    failed: dict[str, str] = {}
    run_sweep(wanted, tools, Board(wanted, Console(file=io.StringIO())), failed)
    return failed


def numbers(request: Request) -> str:
    return csv_text(measure(request.read()[1]))


def whole(request: Request, tools: Any) -> dict[str, str]:
    _, failed = execute(request, tools, Console(file=io.StringIO()))
    return failed


@pytest.fixture(autouse=True)
def _no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_privacy.sweep.tools.rehearse", lambda *arguments: None)


def test_a_whole_sweep_does_each_step_once(request_of: Any, tools: Any, tmp_path: Path) -> None:
    first = tools()
    assert whole(request_of(), first) == {}
    assert Counter(first.done) == {"train": POINTS, "record": POINTS, "attack": 2 * POINTS}
    again = tools()
    assert run(request_of(), again) == {}
    assert again.done == []
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("moment", ["train 1", "record 1", "attack 1", "attack 4"])
def test_an_interrupted_sweep_goes_on_to_the_same_numbers(
    moment: str, request_of: Any, tools: Any, tmp_path: Path
) -> None:
    stopped, rest = tools(interrupt=moment), tools()
    with pytest.raises(KeyboardInterrupt):
        run(request_of(), stopped)
    run(request_of(), rest)
    done = Counter(stopped.done) + Counter(rest.done)
    repeated = 1 if moment == "attack 1" else 0  # the plain one is asked again, and is there
    assert done == {"train": POINTS, "record": POINTS, "attack": 2 * POINTS + repeated}

    another = Request(tmp_path / "sweep.toml", tmp_path / "another")
    run(another, tools())
    assert numbers(another) == numbers(request_of())


def test_an_interruption_leaves_a_page_of_what_is_there(
    request_of: Any, tools: Any, tmp_path: Path
) -> None:
    said = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        execute(request_of(only=("n*",)), tools(interrupt="train 1"), Console(file=said))
    (last,) = said.getvalue().splitlines()[-1:]
    command = f"fl-privacy sweep {tmp_path / 'sweep.toml'} --out {tmp_path / 'out'} --only 'n*'"
    assert last == f"Interrupted; the same command goes on: {command}"
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert f"Unfinished: {3 * (POINTS - 1)} steps left" in page


def test_a_changed_file_repeats_what_changed_and_keeps_the_rest(
    request_of: Any, tools: Any, tmp_path: Path
) -> None:
    run(request_of(), tools())
    text = (tmp_path / "sweep.toml").read_text()
    another = tools()
    run(request_of(text.replace("[0.1, 0.2]", "[0.1, 0.3]")), another)
    assert Counter(another.done) == {"train": 1, "record": 1, "attack": 2}
    rerecorded = tools()
    run(request_of(text.replace("rounds = 1", "rounds = 2")), rerecorded)
    assert Counter(rerecorded.done) == {"record": POINTS, "attack": 2 * POINTS}
    attacked = tools()
    run(request_of(text.replace('"analytic"', '"idlg"')), attacked)
    assert Counter(attacked.done) == {"attack": 2 * POINTS}
    back = tools()
    run(request_of(text), back)
    assert back.done == []


def test_a_point_that_fails_leaves_the_others(request_of: Any, tools: Any) -> None:
    partly = tools(refuse="per_sample_clipping")
    failed = run(request_of(), partly)
    assert len(failed) == 1
    assert set(failed.values()) == {"refused"}
    assert Counter(partly.done)["train"] == POINTS - 1
    mended = tools()
    assert run(request_of(), mended) == {}
    assert Counter(mended.done)["train"] == 1


def test_a_recording_without_all_clients_is_made_again(request_of: Any, tools: Any) -> None:
    (reason,) = run(request_of(), tools(lossy=1)).values()
    assert "1 of the recorded replies are errors" in reason
    assert "(the first: error: out of memory)" in reason
    mended = tools()
    assert run(request_of(), mended) == {}
    assert Counter(mended.done)["record"] == 1


def test_the_page_names_what_failed_and_why(request_of: Any, tools: Any, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=60, height=40)
    execute(request_of(), tools(refuse="per_sample_clipping"), console)
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "3 steps left" in page
    assert "seed 0, training failed: refused</p>" in page
    assert "0 steps left" in said.getvalue()
    assert "training failed: refused\n" in said.getvalue().replace("\r", "")


def test_ray_is_given_a_second_chance_and_no_third(request_of: Any, tools: Any) -> None:
    once = tools(late=1)
    assert run(request_of(), once) == {}
    assert Counter(once.done)["train"] == POINTS
    (why,) = run(Request(request_of().file, request_of().out / "b"), tools(late=2)).values()
    assert why == "Ray did not start in time"


def test_a_bug_is_no_failure_of_a_point(request_of: Any, tools: Any) -> None:
    broken = tools()
    broken.adaptive_plans = lambda *_: int("no number")
    with pytest.raises(ValueError, match="no number"):
        run(request_of(), broken)


def test_a_damaged_stage_is_named_and_nothing_is_removed(
    request_of: Any, tools: Any, tmp_path: Path
) -> None:
    run(request_of(), tools())
    (history,) = (tmp_path / "out" / "points" / "none").glob("seed-0/train-*/history.jsonl")
    history.write_text(history.read_text().splitlines()[0] + "\n")
    again = tools()
    (why,) = run(request_of(), again).values()
    assert f"{history.parent}: incomplete" in why
    assert again.done == []
    history.parent.rename(tmp_path / "aside")
    assert run(request_of(), again) == {}
    assert Counter(again.done) == {"train": 1}


def test_only_chooses_points(request_of: Any, tools: Any) -> None:
    some = tools()
    run(request_of(only=("noise-*", "none")), some)
    assert Counter(some.done)["train"] == 3
    with pytest.raises(SweepError, match=r"fits no point; there are: none, noise-0\.1"):
        run(request_of(only=("nose-*",)), tools())


def test_two_sweeps_do_not_share_a_folder(request_of: Any, tools: Any, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(SweepError, match="another sweep is running"):
        whole(request_of(), tools())


def test_a_folder_that_cannot_be_made_is_one_line(request_of: Any, tools: Any) -> None:
    request = Request(request_of().file, Path("/dev/null/out"))
    with pytest.raises(SweepError, match="cannot be written"):
        whole(request, tools())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"per_sample_clipping(max', '"per_sample_clip(max', "no defense 'per_sample_clip'"),
        ("[1]", "[-2]", "clip-2.*greater than 0"),
        ('"analytic"', '"analytical"', "no adversary 'analytical'"),
        ("adaptive = true", 'metrics = ["mse2"]', "no metric 'mse2'"),
        ('model = "mlp"', 'model = "mpl"', "no model 'mpl'"),
    ],
)
def test_everything_is_refused_before_the_first_simulation(
    old: str, new: str, message: str, request_of: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_privacy.preflight import prepare

    monkeypatch.setattr("fl_privacy.sweep.tools.rehearse", prepare)
    request = request_of()
    request.file.write_text(request.file.read_text().replace(old, new))
    unused = tools()
    with pytest.raises(ComponentError, match=message):
        whole(request, unused)
    assert unused.done == []
    assert not request.out.exists()


def test_a_dry_run_lists_the_work_and_does_nothing(request_of: Any, tmp_path: Path) -> None:
    request = request_of()
    table, line = command.rehearsed(request, "cpu")
    assert table.row_count == POINTS
    narrow = Console(file=io.StringIO(), width=60)
    narrow.print(table)
    assert "…" not in narrow.file.getvalue()  # type: ignore[attr-defined]
    assert "to do: 8 simulations (4 train, 4 record) and 4 attacks" in line
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_an_undefended_point_is_told_what_it_lacks(request_of: Any) -> None:
    _, whole = command.rehearsed(request_of(), "cpu")
    assert "undefended" not in whole
    text = request_of().file.read_text().replace("[defenses.none]\n", "")
    _, line = command.rehearsed(request_of(text), "cpu")
    assert "lack changes against no defense and the start of ratios: add [defenses.none]" in line
    _, line = command.rehearsed(request_of(text.replace('reference = "noise"', "")), "cpu")
    assert "lack changes against no defense: add [defenses.none]" in line


def test_what_is_left_needs_no_simulation_to_be_told(request_of: Any) -> None:
    _, cells = request_of().read()
    assert len(pending(cells)) == 3 * POINTS
    assert cells == cells_of(request_of().read()[0], request_of().out)

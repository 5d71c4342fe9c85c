"""Analyses side by side in processes of a real Ray: the same outcome, and nothing is lost."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from rich.console import Console

from fl_privacy.component import ComponentError
from fl_privacy.sweep.command import workers_for
from fl_privacy.sweep.live import Board, Clock
from fl_privacy.sweep.parallel import gpu_share, side_by_side
from fl_privacy.sweep.private_ray import private_ray
from fl_privacy.sweep.results import measure
from fl_privacy.sweep.running import run_sweep, steps
from fl_privacy.sweep.table import csv_text

DEADLINE_SECONDS = 60.0
SWEEP = """
[run]
dataset = "digits"
model = "mlp"
[record]
[defenses.none]
[defenses.noise]
spec = "gaussian_noise(scale={strength})"
strengths = [0.1, 0.2]
[defenses.clip]
spec = "per_sample_clipping(max_norm={strength})"
strengths = [1]
[[attacks]]
adversary = "analytic"
"""


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with private_ray(2):
        yield


@pytest.fixture
def acting(tools: Any) -> Iterator[Callable[..., Any]]:
    """Make invented tools whose attacks do something first: ``act(run, told)``."""
    modules = sys.modules[tools.__module__], sys.modules[__name__]

    @dataclass
    class Acting(tools):  # type: ignore[misc]
        act: Callable[[Path, Callable[[str], None]], None] = lambda run, told: None

        def attack(self, run: Path, plan: Any, told: Any) -> Any:
            self.act(run, told)
            return super().attack(run, plan, told)

    for module in modules:  # other processes do not find the modules of tests
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    yield lambda act: Acting(act=act)
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


class Interrupting(Board):
    """A board at which Ctrl-C comes when an attack says a word."""

    def told(self, step: Any, words: str) -> None:
        """Interrupt, or show it."""
        if words.endswith("interrupt"):
            raise KeyboardInterrupt
        super().told(step, words)


def run(request: Any, tools: Any, *, workers: int = 2) -> dict[str, str]:
    """The sweep without its page; what failed."""
    _, cells = request.read()
    failed: dict[str, str] = {}
    board = Interrupting(cells, Console(file=io.StringIO()), workers)
    spread = None if workers == 1 else partial(side_by_side, workers=workers)
    run_sweep(cells, tools, board, failed, spread)
    return failed


def processes(points: Path) -> list[list[str]]:
    """Process and number of threads of each attack so far."""
    return [path.name.split(".")[:2] for path in points.rglob("*.met")]


def meet(run: Path) -> None:
    """Wait until two attacks run at once."""
    (run / f"{os.getpid()}.{torch.get_num_threads()}.met").touch()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(processes(run.parents[2])) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


def wait(run: Path, told: Any) -> None:
    """Never end, and keep what there is when interrupted; two attacks at once call for it."""
    try:
        meet(run)
        told("interrupt")
        while True:
            time.sleep(0.02)
    finally:
        (run / "kept").touch()


@pytest.mark.usefixtures("_ray")
def test_an_interruption_lets_each_write_and_the_next_sweep_ends_alike(
    request_of: Any, acting: Any, tools: Any, tmp_path: Path
) -> None:
    request = request_of(SWEEP, only=("none", "noise-0.1"))
    with pytest.raises(KeyboardInterrupt):
        run(request, acting(wait))
    assert len(list(tmp_path.rglob("kept"))) == 2
    assert run(request, tools()) == {}
    numbers = csv_text(measure(request.read()[1]))
    (tmp_path / "out").rename(tmp_path / "side by side")
    assert run(request, tools(), workers=1) == {}
    assert csv_text(measure(request.read()[1])) == numbers


def stumble(run: Path, told: Any) -> None:
    """A bug."""
    int("no number")


@pytest.mark.usefixtures("_ray")
def test_a_bug_in_a_process_ends_the_sweep_and_shows_its_traceback(
    request_of: Any, acting: Any
) -> None:
    with pytest.raises(ValueError, match="no number") as caught:
        run(request_of(SWEEP), acting(stumble))
    assert type(caught.value) is ValueError
    assert "in stumble" in str(caught.value.__cause__)


def fail(run: Path, told: Any) -> None:
    """One attack is refused, and another one's process is killed."""
    meet(run)
    if "clip" in str(run):
        raise ComponentError("refused there")
    if "noise-0.2" in str(run):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("_ray")
def test_two_processes_attack_at_once_and_one_that_fails_is_named_and_leaves_the_others(
    request_of: Any, acting: Any, tools: Any, tmp_path: Path
) -> None:
    failed = run(request_of(SWEEP), acting(fail))
    ran = processes(tmp_path)
    assert len({process for process, _ in ran} - {str(os.getpid())}) >= 2
    assert {threads for _, threads in ran} == {"1"}
    assert failed.pop("clip-1, seed 0, attacking: analytic") == "refused there"
    assert "its process died" in failed.pop("noise-0.2, seed 0, attacking: analytic")
    assert failed == {}

    alone = tools()
    assert run(request_of(SWEEP), alone, workers=1) == {}
    assert alone.done == ["attack", "attack"]  # those that failed, and no other


def test_simulations_come_first_when_analyses_are_spread(request_of: Any, tools: Any) -> None:
    def spread(left: Any, tools: Any, watch: Any, failed: Any) -> None:
        order.append(f"{len(left)} attacks")

    order: list[str] = []
    _, cells = request_of(SWEEP).read()
    board = Board(cells, Console(file=io.StringIO()), 2)
    run_sweep(cells, tools(done=order), board, {}, spread)
    assert order == ["record"] * 4 + ["4 attacks"]


def test_the_time_left_knows_how_many_work() -> None:
    clock = Clock({"train": 2, "attack": 5}, workers=2)
    clock.ended("train", 10.0)
    clock.ended("attack", 3.0)
    assert clock.remaining == 1 * 10.0 + 2 * 3.0
    clock.ended("attack", 5.0)
    assert clock.remaining == 10.0 + 2 * 4.0


def test_all_that_is_worked_at_is_shown(request_of: Any) -> None:
    _, cells = request_of("seeds = [0, 1]\n" + SWEEP).read()
    board = Board(cells, Console(file=io.StringIO(), height=9), 2)
    first, second, *_, last = (steps(cell)[-1] for cell in cells)
    for step in (first, second):
        board.started(step)
        board.told(step, "10 %")
    assert board.row("none")[1].splitlines() == [
        "attacking: analytic: 10 %",
        "seed 1, attacking: analytic: 10 %",
    ]
    board.ended(first, 1.0, "refused")
    assert board.row("none")[1] == "seed 1, attacking: analytic: 10 %"
    assert board.clock.left["attack"] == 2 * 4 - 1
    board.started(last)
    assert list(board.table().columns[0].cells) == ["none", "noise-0.1", "noise-0.2"]
    board.ended(second, 1.0, "refused")
    assert list(board.table().columns[0].cells) == ["noise-0.1", "noise-0.2", "clip-1"]


@pytest.mark.parametrize(
    ("workers", "gpus", "share"), [(1, 1, 1.0), (4, 1, 0.25), (4, 2, 0.5), (3, 2, 0.5), (2, 0, 0)]
)
def test_gpus_are_shared_so_that_all_run_at_once(workers: int, gpus: int, share: float) -> None:
    assert gpu_share(workers, gpus) == share
    assert not gpus or gpus * (1 // share) >= workers


def test_a_cpu_has_a_worker_a_core_unless_told_otherwise() -> None:
    assert workers_for("cpu", None) >= 1
    assert workers_for("cpu", 3) == 3

"""The loop of a sweep: what is not there yet is computed, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from filelock import FileLock, Timeout

from fl_privacy.code_digest import PACKAGES
from fl_privacy.plan import PLAIN, Plan
from fl_privacy.results import ResultSet
from fl_privacy.simulation import RayTimeoutError
from fl_privacy.sweep.answers import (
    GUESS,
    Answer,
    answer_of,
    read_answers,
    write_answers,
)
from fl_privacy.sweep.grid import Attack
from fl_privacy.sweep.reading import SweepError
from fl_privacy.sweep.stages import Cell, Stage

Kind = Literal["train", "record", "attack"]
Told = Callable[[str], None]
"""Hears in a few words how far a step is."""


class Tools(Protocol):
    """What does the work; tests bring their own."""

    def simulate(self, stage: Stage, out: Path, told: Told) -> None:
        """Run a stage's simulation into ``out``."""

    def adaptive_plans(self, run: Path, plan: Plan) -> list[tuple[str, Plan]]:
        """The plain plan first, then those that know the defense, or need not know it."""

    def attack(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Run an adversary on a recording."""

    def guess(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Run the baseline on the targets of a plan."""

    @property
    def device(self) -> str:
        """Where attacks run."""


class Watch(Protocol):
    """Sees the sweep go on, and shows it."""

    def started(self, step: Step) -> None: ...

    def told(self, step: Step, words: str) -> None: ...

    def ended(self, step: Step, seconds: float, error: str) -> None: ...


@dataclass(frozen=True)
class Step:
    """One piece of work of a cell; what it needs comes before it in `steps`."""

    cell: Cell
    kind: Kind
    stage: Stage
    attack: Attack | None = None

    @property
    def done(self) -> bool:
        """Whether its outcome is there."""
        if self.attack is None:
            return self.stage.done
        return self.stage.done and read_answers(self.cell.answer(self.attack)) is not None

    @property
    def title(self) -> str:
        """What it does, in words."""
        return {"train": "training", "record": "recording"}.get(
            self.kind, f"attacking: {self.attack.title if self.attack else ''}"
        )


def steps(cell: Cell) -> list[Step]:
    """The steps of a cell in their order."""
    found = [Step(cell, stage.kind, stage) for stage in cell.stages]
    if cell.record is not None:
        found += [Step(cell, "attack", cell.record, attack) for attack in cell.attacks]
    return found


def pending(cells: Sequence[Cell]) -> list[Step]:
    """All that is left to do."""
    return [step for cell in cells for step in steps(cell) if not step.done]


def run_sweep(cells: Sequence[Cell], tools: Tools, watch: Watch, failed: dict[str, str]) -> None:
    """Do what is left; adds the cells that fail to ``failed``, each with its reason.

    A cell that fails leaves the others: only what the package itself refuses or reports
    counts as a failure, anything else is a bug and ends the sweep.
    """
    for cell in cells:
        for step in steps(cell):
            if step.done:
                continue
            error = _attempt(step, tools, watch)
            if error:
                failed[f"{cell.point.name}, seed {cell.seed}, {step.title}"] = error
                break


def _attempt(step: Step, tools: Tools, watch: Watch) -> str:
    """Do one step; returns why it failed, or nothing."""
    start, error = time.monotonic(), ""
    watch.started(step)
    try:
        perform(step, tools, lambda words: watch.told(step, words))
    except (ValueError, RuntimeError) as failure:
        if type(failure).__module__.partition(".")[0] not in PACKAGES:
            raise
        error = str(failure)
    watch.ended(step, time.monotonic() - start, error)
    return error


def perform(step: Step, tools: Tools, told: Told) -> None:
    """Do one step from its beginning; an attack goes on with the targets it lacks.

    Where Ray did not start in time, a simulation is tried once more.
    """
    if step.attack is None:
        try:
            step.stage.perform(lambda out: tools.simulate(step.stage, out, told))
        except RayTimeoutError:
            told("Ray did not start in time, trying again")
            step.stage.perform(lambda out: tools.simulate(step.stage, out, told))
        return
    start = time.monotonic()
    made = list(_attacked(step, step.attack, tools, told))
    write_answers(step.cell.answer(step.attack), made, time.monotonic() - start)


def _attacked(step: Step, attack: Attack, tools: Tools, told: Told) -> Iterator[Answer]:
    run, folder = step.stage.folder, step.cell.folder
    plain = attack.plan(step.cell.seed, tools.device)
    plans = tools.adaptive_plans(run, plain) if attack.adaptive else [(PLAIN, plain)]
    if attack.adaptive is not True:
        plans = plans[: 1 + attack.adaptive]
    for number, (label, plan) in enumerate(plans, start=1):
        place = f"{label} ({number}/{len(plans)})" if len(plans) > 1 else label

        def say(words: str, place: str = place) -> None:
            told(f"{place} {words}")

        yield answer_of(label, tools.attack(run, plan, say), folder)
    yield answer_of(GUESS, tools.guess(run, plain, told), folder)


def locked(out: Path) -> FileLock:
    """Hold the sweep's folder, made if missing, against a second sweep.

    Raises:
        SweepError: another process holds it, or it cannot be written.
    """
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise SweepError(f"{out}: another sweep is running there; wait for its end") from None
    except OSError as error:
        raise SweepError(f"{out}: cannot be written ({error.strerror}); name another") from None
    return lock

"""The loop of a sweep: what is not there yet is computed, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from filelock import FileLock, Timeout

from fl_privacy.adaptive_command import Adaptive
from fl_privacy.code_digest import PACKAGES
from fl_privacy.component import ComponentError
from fl_privacy.measuring import MeasurePlan
from fl_privacy.plan import PLAIN, AnalysisError, Plan
from fl_privacy.results import ResultSet
from fl_privacy.simulation import RayTimeoutError
from fl_privacy.sweep.answers import (
    GUESS,
    Answer,
    Answers,
    answer_of,
    read_answers,
    read_measured,
    write_answers,
    write_measured,
)
from fl_privacy.sweep.offline import Attack, Measure
from fl_privacy.sweep.reading import SweepError
from fl_privacy.sweep.stages import Cell, Stage
from fl_privacy.threat_model import ThreatModelError

Kind = Literal["train", "record", "attack", "measure"]
SIMULATIONS: tuple[Kind, ...] = ("train", "record")
"""What Flower does; every other kind of step is an analysis of what they left."""

Told = Callable[[str], None]
"""Hears in a few words how far a step is."""


class Tools(Protocol):
    """What does the work; tests bring their own."""

    def simulate(self, stage: Stage, out: Path, told: Told) -> None:
        """Run a stage's simulation into ``out``."""

    def adaptive_plans(self, run: Path, plan: Plan, most: int | None) -> Adaptive:
        """The plain plan first, then those that know the defense, and those that need not.

        At most ``most`` of each; all for none.
        """

    def attack(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Run an adversary on a recording."""

    def guess(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Run the baseline on the targets of a plan."""

    def measure(self, run: Path, plan: MeasurePlan, told: Told) -> list[Path]:
        """Measure layers of a recording; the files that hold it."""

    @property
    def device(self) -> str:
        """Where attacks and measures run."""


class Watch(Protocol):
    """Sees the sweep go on, and shows it."""

    def started(self, step: Step) -> None: ...

    def told(self, step: Step, words: str) -> None: ...

    def ended(self, step: Step, seconds: float, error: str) -> None: ...


class Analyze(Protocol):
    """Does analyses, whose simulations are there; adds those that fail to ``failed``."""

    def __call__(
        self, left: Sequence[Step], tools: Tools, watch: Watch, failed: dict[str, str]
    ) -> None: ...


@dataclass(frozen=True)
class Step:
    """One piece of work of a cell; what it needs comes before it in `steps`."""

    cell: Cell
    kind: Kind
    stage: Stage
    attack: Attack | None = None
    measure: Measure | None = None

    @property
    def done(self) -> bool:
        """Whether its outcome is there."""
        if not self.stage.done:
            return False
        if self.attack is not None:
            return read_answers(self.cell.answer(self.attack)) is not None
        if self.measure is not None:
            return read_measured(self.cell.answer(self.measure)) is not None
        return True

    @property
    def simulates(self) -> bool:
        """Whether it is a run of Flower, and no work on a recording."""
        return self.kind in SIMULATIONS

    @property
    def name(self) -> str:
        """Which of all steps it is, in words."""
        return f"{self.cell.point.name}, seed {self.cell.seed}, {self.title}"

    @property
    def title(self) -> str:
        """What it does, in words."""
        if self.attack is not None:
            return f"attacking: {self.attack.title}"
        if self.measure is not None:
            return f"measuring: {self.measure.title}"
        return {"train": "training"}.get(self.kind, "recording")


def steps(cell: Cell) -> list[Step]:
    """The steps of a cell in their order."""
    found = [Step(cell, stage.kind, stage) for stage in cell.stages]
    if cell.record is not None:
        found += [Step(cell, "attack", cell.record, attack) for attack in cell.attacks]
        found += [Step(cell, "measure", cell.record, None, measure) for measure in cell.measures]
    return found


def pending(cells: Sequence[Cell]) -> list[Step]:
    """All that is left to do."""
    return [step for cell in cells for step in steps(cell) if not step.done]


def run_sweep(
    cells: Sequence[Cell],
    tools: Tools,
    watch: Watch,
    failed: dict[str, str],
    spread: Analyze | None = None,
) -> None:
    """Do what is left; adds the steps that fail to ``failed``, each with its reason.

    Cell by cell; with ``spread`` all simulations, on a machine that does nothing else, so that
    their rounds are timed alike, and then all analyses at once. A step that fails leaves those
    that do not need it: only what the package itself refuses or reports counts as a failure,
    anything else is a bug and ends the sweep.
    """
    for group in [cells] if spread else [[cell] for cell in cells]:
        ready = [cell for cell in group if _simulated(cell, tools, watch, failed)]
        (spread or in_turn)(pending(ready), tools, watch, failed)


def _simulated(cell: Cell, tools: Tools, watch: Watch, failed: dict[str, str]) -> bool:
    """Do what simulations a cell lacks; whether all of them are there."""
    left = (step for step in steps(cell) if step.simulates and not step.done)
    return all(_attempt(step, tools, watch, failed) for step in left)


def in_turn(left: Sequence[Step], tools: Tools, watch: Watch, failed: dict[str, str]) -> None:
    """Do analyses in this process, one after another."""
    for step in left:
        _attempt(step, tools, watch, failed)


def _attempt(step: Step, tools: Tools, watch: Watch, failed: dict[str, str]) -> bool:
    """Do one step; whether it is done now."""
    start = time.monotonic()
    watch.started(step)
    error = trouble(step, tools, lambda words: watch.told(step, words))
    watch.ended(step, time.monotonic() - start, error)
    if error:
        failed[step.name] = error
    return not error


def trouble(step: Step, tools: Tools, told: Told) -> str:
    """Do one step; returns why the package refused or failed it, or nothing."""
    try:
        perform(step, tools, told)
    except (ValueError, RuntimeError) as failure:
        if type(failure).__module__.partition(".")[0] not in PACKAGES:
            raise
        return str(failure)
    return ""


def perform(step: Step, tools: Tools, told: Told) -> None:
    """Do one step from its beginning; an attack goes on with the targets it lacks.

    Where Ray did not start in time, a simulation is tried once more.
    """
    if step.simulates:
        try:
            step.stage.perform(lambda out: tools.simulate(step.stage, out, told))
        except RayTimeoutError:
            told("Ray did not start in time, trying again")
            step.stage.perform(lambda out: tools.simulate(step.stage, out, told))
        return
    start = time.monotonic()
    if step.attack is not None:
        made, skipped = _attacked(step, step.attack, tools, told)
        seconds = round(time.monotonic() - start, 3)
        found = Answers(seconds=seconds, made=tuple(made), skipped=tuple(skipped))
        write_answers(step.cell.answer(step.attack), found)
    if step.measure is not None:
        plan = step.measure.plan(step.cell.seed, tools.device)
        files = tools.measure(step.stage.folder, plan, told)
        write_measured(step.cell.answer(step.measure), files, time.monotonic() - start)


def _attacked(
    step: Step, attack: Attack, tools: Tools, told: Told
) -> tuple[list[Answer], list[tuple[str, str]]]:
    """Run all adversaries and the guess; an adaptation that is refused is left out.

    Raises:
        ThreatModelError, ComponentError, AnalysisError: the plain one is refused.
    """
    run, folder = step.stage.folder, step.cell.folder
    plain = attack.plan(step.cell.seed, tools.device, run)
    all_there_are = attack.adaptive is True
    adaptive = (
        tools.adaptive_plans(run, plain, None if all_there_are else int(attack.adaptive))
        if attack.adaptive
        else Adaptive([(PLAIN, plain)], [])
    )
    made, skipped = [], list(adaptive.skipped)
    for number, (label, plan) in enumerate(adaptive.plans, start=1):
        place = f"{label} ({number}/{len(adaptive.plans)})" if attack.adaptive else label

        def say(words: str, place: str = place) -> None:
            told(f"{place} {words}")

        try:
            made.append(answer_of(label, tools.attack(run, plan, say), folder))
        except (ThreatModelError, ComponentError, AnalysisError) as error:
            if label == PLAIN:
                raise
            skipped.append((label, str(error)))
    return [*made, answer_of(GUESS, tools.guess(run, plain, told), folder)], skipped


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

"""What ``fl-privacy sweep`` does once its options are read."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from joblib import cpu_count  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from fl_privacy.plan import resolve_device
from fl_privacy.printable import plain, printable
from fl_privacy.superlink import signals_raise
from fl_privacy.sweep.grid import Sweep
from fl_privacy.sweep.live import folded, shown
from fl_privacy.sweep.page import write_page
from fl_privacy.sweep.reading import SweepError, read_sweep
from fl_privacy.sweep.results import measure
from fl_privacy.sweep.running import Analyze, Step, Tools, locked, pending, run_sweep, steps
from fl_privacy.sweep.stages import Cell, cells_of
from fl_privacy.sweep.tools import preflight


@dataclass(frozen=True)
class Request:
    """A sweep as the command line asks for it."""

    file: Path
    out: Path
    pairs: tuple[str, ...] = ()
    full: bool = False
    only: tuple[str, ...] = ()

    def read(self) -> tuple[Sweep, list[Cell]]:
        """The sweep and all its cells.

        Raises:
            SweepError, ComponentError: the file cannot be used.
        """
        sweep = read_sweep(self.file, pairs=self.pairs, full=self.full)
        return sweep, cells_of(sweep, self.out)

    def wanted(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells whose points were asked for; all without ``only``.

        Raises:
            SweepError: a pattern that fits no point.
        """
        names = [cell.point.name for cell in cells]
        for pattern in self.only:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = ", ".join(dict.fromkeys(names))
                raise SweepError(f"--only {pattern!r} fits no point; there are: {known}")
        fits = [any(fnmatchcase(name, p) for p in self.only or ("*",)) for name in names]
        return [cell for cell, fit in zip(cells, fits, strict=True) if fit]

    @property
    def command(self) -> str:
        """What makes the whole sweep, as a command line."""
        parts = ["fl-privacy", "sweep", str(self.file), "--out", str(self.out)]
        parts += ["--full"] if self.full else []
        parts += [word for pair in self.pairs for word in ("--set", pair)]
        return shlex.join(parts)

    @property
    def typed(self) -> str:
        """The same request as a command line."""
        only = [word for pattern in self.only for word in ("--only", pattern)]
        return f"{self.command} {shlex.join(only)}".strip()


def workers_for(device: str, asked: int | None) -> int:
    """How many analyses run at once: as many as asked for, or cores; one on anything but a CPU.

    Raises:
        AnalysisError: there is no such device.
    """
    if asked is not None:
        return asked
    return int(cpu_count()) if resolve_device(device).type == "cpu" else 1


def execute(
    request: Request, tools: Tools, console: Console, workers: int = 1
) -> tuple[Path, dict[str, str]]:
    """Check everything, do what is left, write the page; returns it and what failed.

    Several ``workers`` are processes of Ray; one is this process.

    An interruption, SIGTERM too, leaves what is finished, and a page of that.

    Raises:
        SweepError, ComponentError, DatasetError, AnalysisError: refused before any work.
    """
    sweep, cells = request.read()
    wanted = request.wanted(cells)
    console.print(summary(sweep, wanted), markup=False, highlight=False)
    preflight(pending(wanted), tools.device)
    with locked(request.out), signals_raise():
        failed: dict[str, str] = {}
        try:
            with shown(wanted, console, workers) as board:
                run_sweep(wanted, tools, board, failed, spread(workers))
        except (KeyboardInterrupt, SystemExit):
            words = f"Interrupted; the same command goes on: {request.typed}"
            console.print(plain(words), markup=False, highlight=False, soft_wrap=True)
            raise
        finally:
            page = publish(request, sweep, cells, failed)
    return page, failed


def spread(workers: int) -> Analyze | None:
    """What does analyses side by side, if there are several workers; Ray is loaded only then."""
    if workers == 1:
        return None
    from fl_privacy.sweep.parallel import Spread

    return Spread(workers)


def rehearsed(request: Request, device: str) -> tuple[Table, str]:
    """Check everything and say what would be done.

    Raises:
        SweepError, ComponentError, DatasetError, AnalysisError: what would be refused.
    """
    sweep, cells = request.read()
    wanted = request.wanted(cells)
    preflight(pending(wanted), device)
    return overview(wanted), summary(sweep, wanted)


def publish(
    request: Request, sweep: Sweep, cells: Sequence[Cell], failed: Mapping[str, str]
) -> Path:
    """Write the page of all that is there, and of what failed."""
    left = len(pending(cells))
    return write_page(request.out, sweep, measure(cells), left, request.command, failed)


def summary(sweep: Sweep, cells: Sequence[Cell]) -> str:
    """How much work there is, and what the page will lack."""
    if any(not line.spec for line in sweep.defenses.values()):
        return estimate(cells)
    lacks = ["changes against no defense"] + ["the start of ratios"] * bool(sweep.reference)
    return (
        f"{estimate(cells)}\nNo undefended point, so the page will lack "
        f"{' and '.join(lacks)}: add [defenses.none] without a spec"
    )


def estimate(cells: Sequence[Cell]) -> str:
    """How much work there is, in one line."""
    every = [step for cell in cells for step in steps(cell)]
    left = [step for step in every if not step.done]
    kinds = Counter(step.kind for step in left)
    adaptive = any(step.attack.adaptive for step in left if step.attack)
    points = len({cell.point.name for cell in cells})
    return (
        f"{points} points, {len(cells)} with seeds; to do: "
        f"{kinds['train'] + kinds['record']} simulations ({kinds['train']} train, "
        f"{kinds['record']} record) and {kinds['attack']} attacks"
        f"{', more with the adaptive ones' if adaptive else ''}"
        f"{', ' + str(kinds['measure']) + ' measures' if kinds['measure'] else ''}; "
        f"done: {len(every) - len(left)} of {len(every)} steps"
    )


def overview(cells: Sequence[Cell]) -> Table:
    """Every point with its defense and what is left of it."""
    table = folded("point", "defense", "left")
    for name in dict.fromkeys(cell.point.name for cell in cells):
        mine = [cell for cell in cells if cell.point.name == name]
        todo = [_short(step) for cell in mine for step in steps(cell) if not step.done]
        words = ", ".join(f"{n} {what}" for what, n in Counter(todo).items()) or "nothing"
        table.add_row(*map(printable, (name, mine[0].point.spec or "none", words)))
    return table


def _short(step: Step) -> str:
    asked = step.attack or step.measure
    return step.kind if asked is None else asked.title

"""The live table of a sweep: a row a point; plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from fl_privacy.printable import plain, printable
from fl_privacy.sweep.results import Adversary, Measured, measure
from fl_privacy.sweep.running import SIMULATIONS, Kind, Step, pending
from fl_privacy.sweep.stages import Cell
from fl_privacy.sweep.table import MISSING, digits, percent

ROOM = 6
"""Lines of a terminal that are not for rows."""


@dataclass
class Clock:
    """How long steps take, by kind, and so how long the rest will: ``workers`` do analyses."""

    left: dict[Kind, int]
    workers: int = 1
    spent: dict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))

    def ended(self, kind: Kind, seconds: float) -> None:
        """A step is over."""
        self.left[kind] -= 1
        self.spent[kind].append(seconds)

    @property
    def remaining(self) -> float | None:
        """Seconds that are left; None while a kind that is left has never been timed."""
        total = 0.0
        for kind, count in self.left.items():
            if count and not self.spent[kind]:
                return None
            at_once = 1 if kind in SIMULATIONS else self.workers
            mean = sum(self.spent[kind]) / max(len(self.spent[kind]), 1)
            total += math.ceil(count / at_once) * mean
        return total

    @property
    def words(self) -> str:
        """How many steps are left, and how long they may take once that can be told."""
        steps, remaining = sum(self.left.values()), self.remaining
        said = f"{steps} step{'' if steps == 1 else 's'} left"
        return said if remaining is None or not steps else f"{said}, about {clock(remaining)}"


def folded(*titles: str) -> Table:
    """A table that cuts nothing off: what is too wide goes on below."""
    return Table(*(Column(title, overflow="fold") for title in titles))


class Board:
    """A `Watch` that keeps what is shown: what each point is at and what it measured."""

    def __init__(self, cells: Sequence[Cell], console: Console, workers: int = 1) -> None:
        self.console = console
        self.cells = {c.point.name: [o for o in cells if o.point == c.point] for c in cells}
        left = pending(cells)
        self.clock = Clock(Counter(step.kind for step in left), workers)
        waiting = {step.cell.point.name for step in left}
        self.state = {name: "waiting" if name in waiting else "done" for name in self.cells}
        self.measured = {name: _measured(mine) for name, mine in self.cells.items()}
        self.seconds: dict[str, float] = defaultdict(float)
        self.running: dict[str, dict[str, str]] = {name: {} for name in self.cells}
        self.middle = 0
        self.live: Live | None = None

    def started(self, step: Step) -> None:
        """Say what begins."""
        self.running[step.cell.point.name][_where(step)] = ""
        self._say(step, "started")

    def told(self, step: Step, words: str) -> None:
        """Show how far it is; without a terminal the ends are enough."""
        self.running[step.cell.point.name][_where(step)] = f"{_where(step)}: {words}"
        self._draw()

    def ended(self, step: Step, seconds: float, error: str) -> None:
        """Show what came of it."""
        name = step.cell.point.name
        self.running[name].pop(_where(step), None)
        self.seconds[name] += seconds
        self.clock.ended(step.kind, seconds)
        self.measured[name] = _measured(self.cells[name])
        if error:
            for later in _untried(step):
                self.clock.left[later.kind] -= 1
            self._say(step, "failed", f"failed: {error}")
        else:
            self._say(step, f"finished in {seconds:.0f} s")
        if not error and not pending(self.cells[name]):
            self.state[name] = "done"
            self._draw()

    def _say(self, step: Step, words: str, whole: str = "") -> None:
        """``words`` into the table; a line of its own for the ``whole``, or where no table is."""
        self.state[step.cell.point.name] = f"{_where(step)} {words}"
        if self.live is None or whole:
            line = f"{step.cell.point.name}, seed {step.cell.seed}: {step.title} {whole or words}"
            self.console.print(plain(line), markup=False, highlight=False, soft_wrap=True)
        self._draw()

    def _draw(self) -> None:
        if self.live is not None:
            self.live.update(self.table())

    def table(self) -> Table:
        """The points around those that are worked at, as many as the terminal has room for."""
        table = folded("point", "at", "accuracy", "MSE plain", "strongest", "time")
        table.caption, table.caption_justify = self.clock.words, "left"
        names = list(self.cells)
        room = max(3, self.console.height - ROOM)
        first = max(0, min(self._at() - room // 2, len(names) - room))
        for name in names[first : first + room]:
            table.add_row(*map(printable, self.row(name)))
        return table

    def _at(self) -> int:
        """The number of the point in the middle of those that are worked at, or were last."""
        working = [i for i, running in enumerate(self.running.values()) if running]
        if working:
            self.middle = (working[0] + working[-1]) // 2
        return self.middle

    def row(self, name: str) -> tuple[str, ...]:
        """One point."""
        found = self.measured[name]
        attacked = found.attacks[0] if found and found.attacks else None
        return (
            name,
            "\n".join(self.running[name].values()) or self.state[name],
            percent(found.accuracy).partition(" [")[0] if found else MISSING,
            _error(attacked.plain) if attacked else MISSING,
            _error(attacked.strongest) if attacked else MISSING,
            clock(self.seconds[name]) if self.seconds[name] else "",
        )


def _untried(failed: Step) -> list[Step]:
    """What is not tried this time: all that needs a simulation which failed."""
    if not failed.simulates:
        return []
    return [step for step in pending([failed.cell]) if step != failed]


def _where(step: Step) -> str:
    seeds = f"seed {step.cell.seed}, " if step.cell.seed else ""
    return f"{seeds}{step.title}"


def _measured(cells: Sequence[Cell]) -> Measured | None:
    found = measure(cells)
    return found[0] if found else None


def _error(adversary: Adversary) -> str:
    found = adversary.interval("mse")
    return MISSING if found is None else digits(found.mean)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def shown(cells: Sequence[Cell], console: Console, workers: int = 1) -> Iterator[Board]:
    """Yield a board that is drawn on ``console`` while the block runs."""
    board = Board(cells, console, workers)
    if not console.is_terminal:
        yield board
        return
    with Live(board.table(), console=console, refresh_per_second=4) as live:
        board.live = live
        yield board

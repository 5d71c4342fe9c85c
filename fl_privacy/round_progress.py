"""The progress of a simulation, read from Flower's log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich import progress
from rich.console import Console

from fl_privacy.simulation import round_of

INITIAL = "Evaluating the initial model"
FINISHED = "Strategy execution finished"


@contextmanager
def round_progress(verbose: bool) -> Iterator[Callable[[str], None]]:
    """Yield what takes Flower's log line by line: a bar of rounds, or the lines themselves."""
    if verbose:
        yield typer.echo
        return
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[rounds]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task("preparing, starting Flower", total=None, rounds="")
        yield lambda line: _advance(bar, task, line)


def _advance(bar: progress.Progress, task: progress.TaskID, line: str) -> None:
    if INITIAL in line:
        bar.update(task, description="evaluating the initial model")
        return
    if reached := round_of(line):
        done, rounds, what = reached[0] - 1, reached[1], "training"
    elif FINISHED in line and bar.tasks[task].total:
        done = rounds = int(bar.tasks[task].total or 0)
        what = "stopping Flower"
    else:
        return
    text = f"{done}/{rounds} rounds"
    bar.update(task, description=what, completed=done, total=rounds, rounds=text)

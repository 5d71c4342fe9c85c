"""The live progress of an attack: share done, time left, and the adversary's own loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from torch import Tensor

from fl_privacy.printable import plain
from fl_privacy.protocols import Progress

REDRAW_SECONDS = 0.2


@contextmanager
def attack_progress(name: str) -> Iterator[Progress]:
    """Yield a `Progress` that draws a bar on standard error.

    The loss is read from the device only when the bar is redrawn, five times a second
    at most, so that the attack hardly ever waits for it.
    """
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=16),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    drawn = 0.0
    with progress.Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(plain(name), total=None, loss="")

        def show(done: int, total: int, *, loss: Tensor | None = None) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn < REDRAW_SECONDS and done < total:
                return
            drawn = now
            text = "" if loss is None else f"loss {float(loss):.4f}"
            bar.update(task, completed=done, total=total, loss=text)

        yield show
        total = bar.tasks[0].total or 1
        bar.update(task, completed=total, total=total)

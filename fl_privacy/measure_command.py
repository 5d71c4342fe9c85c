"""What ``fl-privacy measure`` does once its options are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table

from fl_privacy.attack_progress import attack_progress
from fl_privacy.custom_model import custom_model
from fl_privacy.layer_results import Measurement, measured_before
from fl_privacy.layers import LayerMetricError
from fl_privacy.measuring import MeasureJob, MeasurePlan, measure, prepare_measurements
from fl_privacy.printable import printable
from fl_privacy.report.layer_words import about, columns, heading
from fl_privacy.types import Task

FIRST = 5
"""Columns that a terminal has room for."""


@dataclass(frozen=True)
class Measured:
    """What one measurement found, or why there is none; ``held``: the run had it before."""

    spec: str
    found: Measurement | None
    held: bool = False
    why: str = ""


def measure_all(
    run: Path, plan: MeasurePlan, *, model: str = "", task: Task | None = None
) -> Iterator[Measured]:
    """Every measurement of a plan, as it gets done, each with its progress bar.

    A metric that the user named and that refuses ends the command; one of those that were taken
    because the data allows it is left out.
    """
    factory = custom_model(model) if model else None
    jobs, left_out = prepare_measurements(run, plan, model=factory, model_name=model, task=task)
    for spec, why in left_out:
        yield Measured(spec, None, why=why)
    for number, job in enumerate(jobs, 1):
        of = f" of {job.config.about}" if job.config.about else ""
        yield _measured(job, f"{number}/{len(jobs)} {job.config.name}{of}")


def _measured(job: MeasureJob, label: str) -> Measured:
    spec = job.config.metric
    if (held := measured_before(job.run, job.config)) is not None:
        return Measured(spec, held, held=True)
    try:
        with attack_progress(label) as progress:
            return Measured(spec, measure(job, progress=progress))
    except LayerMetricError as error:
        if job.asked:
            raise
        return Measured(spec, None, why=str(error))


def shown(found: Measurement) -> Group:
    """A measurement for the terminal: what it is, and a row a layer with the first columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("layer", overflow="fold")
    every = columns(found)
    for column in every[:FIRST]:
        head = f"{column.title}\n{column.unit}" if column.unit else column.title
        table.add_column(printable(head), justify="right", overflow="fold")
    for i, layer in enumerate(found.layers):
        table.add_row(printable(layer), *(printable(c.cells[i]) for c in every[:FIRST]))
    rest = "; ".join(column.title for column in every[FIRST:])
    more = f"In the report also: {printable(rest)}\n" if rest else ""
    head = f"[bold]{printable(heading(found))}[/]\n{printable(about(found))}"
    return Group(head, table, more)

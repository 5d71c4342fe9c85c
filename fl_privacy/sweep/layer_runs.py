"""What each recording of a sweep told of its layers: the attacker's AUC, and every measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fl_privacy.layer_results import Measurement, read_measurement
from fl_privacy.plan import PLAIN
from fl_privacy.prediction import LayerAuc
from fl_privacy.property_table import WHOLE
from fl_privacy.report.analyses import Analysis, analyses
from fl_privacy.report.layer_aucs import aucs_of
from fl_privacy.sweep.answers import GUESS, read_answers, read_measured
from fl_privacy.sweep.offline import Attack
from fl_privacy.sweep.stages import Cell


@dataclass(frozen=True)
class LayerRun:
    """One repeat of a point; among ``aucs`` that of the whole update has the layer `WHOLE`."""

    seed: int
    aucs: tuple[LayerAuc, ...]
    measured: tuple[Measurement, ...]


def layer_runs(cells: Sequence[Cell]) -> list[LayerRun]:
    """The repeats in which anything is known of layers.

    Raises:
        SweepError, ResultError, LayerResultError: a file is there and cannot be read.
    """
    runs = [
        LayerRun(cell.seed, tuple(attacked(cell)), tuple(measured(cell)))
        for cell in cells
        if cell.record is not None
    ]
    return [run for run in runs if run.aucs or run.measured]


def attacked(cell: Cell) -> Iterator[LayerAuc]:
    """The AUC of every attack on a property that is finished, of the whole update first."""
    for attack in cell.attacks:
        answers = read_answers(cell.answer(attack))
        if answers is None:
            continue
        made = {one.label: one.open(cell.folder) for one in answers.made}
        plain = _named(attack, analyses([made[PLAIN]])[0])
        if plain.infers_property:
            null = analyses([made[GUESS]])[0] if GUESS in made else None
            yield from aucs_of(plain, null, whole=WHOLE)


def _named(attack: Attack, found: Analysis) -> Analysis:
    return replace(found, label=attack.title)


def measured(cell: Cell) -> Iterator[Measurement]:
    """Every measurement that is finished."""
    for measure in cell.measures:
        made = read_measured(cell.answer(measure))
        for file in made.files if made else ():
            yield read_measurement(cell.folder / file)

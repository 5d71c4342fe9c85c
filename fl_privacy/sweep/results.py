"""What a sweep measured, read from its folders: accuracy, cost and leakage of every point."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fl_privacy.metrics.statistics import Interval, mean_interval, wilson
from fl_privacy.plan import PLAIN
from fl_privacy.recording import Recording
from fl_privacy.report.contest import client_means, comparable, mean_over
from fl_privacy.report.reading import read_history
from fl_privacy.report.scores import interval_of, interval_over
from fl_privacy.results import MetricInfo, ResultSet
from fl_privacy.run_folder import RunFolder
from fl_privacy.sweep.answers import GUESS, read_answers
from fl_privacy.sweep.grid import Point
from fl_privacy.sweep.offline import Attack
from fl_privacy.sweep.repeats import over_repeats
from fl_privacy.sweep.stages import Cell, Stage
from fl_privacy.truth import TruthVault

BOOKKEEPING = {"samples", "partition"}
"""What clients write down beside what their defense says."""

STRONGEST_BY = "mse"
"""The metric whose mean says which adversary is the strongest: the smallest error."""


@dataclass(frozen=True)
class Curve:
    """Test accuracy (a share) and loss after each round, from round 0, of one training run."""

    accuracy: tuple[float, ...]
    loss: tuple[float | None, ...]
    samples: int


@dataclass(frozen=True)
class Adversary:
    """One adversary against one point: the targets of all seeds together."""

    label: str
    results: tuple[ResultSet, ...]
    folders: tuple[Path, ...]

    @property
    def metrics(self) -> Mapping[str, MetricInfo]:
        """What it was scored by."""
        return {metric.name: metric for metric in self.results[0].config.metrics}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a target."""
        return [row for result in self.results for row in result.rows()]

    def by_client(self, metric: str) -> dict[Hashable, float]:
        """The mean score of each client; seeds have clients of their own."""
        return {
            (seed, client): mean
            for seed, result in enumerate(self.results)
            for client, mean in client_means(result.rows(), metric).items()
        }

    def interval(self, metric: str) -> Interval | None:
        """Mean over targets with its 95 % interval; None when nothing was scored by it.

        What scores a set as a whole: that of the only seed, or the mean over seeds.
        """
        if metric not in self.metrics:
            return None
        info = self.metrics[metric]
        if info.set_level:
            sets = [interval_over(result.rows(), info) for result in self.results]
            means = (one.mean for one in sets)
            found = sets[0] if len(sets) == 1 else over_repeats(means, share=info.is_share)
        else:
            found = interval_of([row.get(metric) for row in self.rows], info)
        return found if found.n else None


@dataclass(frozen=True)
class Attacked:
    """One attack on one point: all its adversaries, the guess, and who was left out and why."""

    attack: Attack
    adversaries: tuple[Adversary, ...]
    guess: Adversary | None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> Adversary:
        """The adversary that knows of no defense."""
        return self.adversaries[0]

    @property
    def reconstructs(self) -> bool:
        """Whether it makes images, and so has an error; else it infers something about them."""
        return STRONGEST_BY in self.plain.metrics

    @property
    def strongest(self) -> Adversary:
        """The one with the smallest mean error, plain or adaptive, over clients that all scored.

        The plain one where nothing is reconstructed, and so no error known.
        """
        means = [adversary.by_client(STRONGEST_BY) for adversary in self.adversaries]
        rivals, common = comparable(means)
        if not common:
            return self.plain
        best = min(rivals, key=lambda i: (mean_over(common, means[i]), i))
        return self.adversaries[best]


@dataclass(frozen=True)
class Measured:
    """Everything that is known of a point so far.

    ``reported``: means of what the clients' defense said of its work, such as the share pruned.
    """

    point: Point
    seeds: tuple[int, ...]
    curves: tuple[Curve, ...]
    round_seconds: tuple[float, ...]
    uploads: tuple[int, ...]
    attacks: tuple[Attacked, ...]
    cells: tuple[Cell, ...] = ()
    reported: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> Interval | None:
        """Final test accuracy, a share: Wilson over test samples for one seed, t over several."""
        last = [(curve.accuracy[-1], curve.samples) for curve in self.curves]
        if len(last) == 1:
            share, n = last[0]
            return wilson(share * n, n)
        return mean_interval(share for share, _ in last) if last else None

    @property
    def seconds(self) -> float | None:
        """Median seconds of a round, all seeds together."""
        return statistics.median(self.round_seconds) if self.round_seconds else None

    @property
    def upload(self) -> float | None:
        """Mean bytes of an upload as received."""
        return statistics.fmean(self.uploads) if self.uploads else None

    def attacked(self, title: str) -> Attacked | None:
        """One of its attacks by name."""
        return next((a for a in self.attacks if a.attack.title == title), None)


class _Timed(BaseModel):
    attempt: int
    round: int
    seconds: float


def measure(cells: Sequence[Cell]) -> list[Measured]:
    """All points that have anything, in the order of the sweep."""
    grouped = [list(group) for _, group in groupby(cells, key=lambda cell: cell.point)]
    found = [_measured(group) for group in grouped]
    return [m for m in found if m.curves or m.attacks or m.uploads]


def _measured(cells: Sequence[Cell]) -> Measured:
    trained = [c.train for c in cells if c.train and c.train.done]
    recorded = [c.record for c in cells if c.record and c.record.done]
    attacks = [_attacked(cells, number) for number in range(len(cells[0].attacks))]
    return Measured(
        point=cells[0].point,
        seeds=tuple(c.seed for c in cells if any(stage.done for stage in c.stages)),
        curves=tuple(map(curve, trained)),
        round_seconds=tuple(s for stage in trained for s in round_seconds(stage)),
        uploads=tuple(b for stage in trained or recorded for b in upload_bytes(stage)),
        attacks=tuple(attack for attack in attacks if attack),
        cells=tuple(cells),
        reported=reported(recorded),
    )


def _attacked(cells: Sequence[Cell], number: int) -> Attacked | None:
    by_label: dict[str, list[tuple[ResultSet, Path]]] = {}
    skipped: dict[tuple[str, str], None] = {}
    for cell in cells:
        if cell.record is None:
            continue
        answers = read_answers(cell.answer(cell.attacks[number]))
        if answers is None:
            continue
        skipped.update(dict.fromkeys(answers.skipped))
        for answer in answers.made:
            place = (answer.open(cell.folder), cell.record.folder)
            by_label.setdefault(answer.label, []).append(place)
    made = {
        label: Adversary(label, tuple(r for r, _ in places), tuple(f for _, f in places))
        for label, places in by_label.items()
    }
    guess = made.pop(GUESS, None)
    if PLAIN not in made:
        return None
    plain = made.pop(PLAIN)
    return Attacked(cells[0].attacks[number], (plain, *made.values()), guess, tuple(skipped))


def curve(stage: Stage) -> Curve:
    """The history of a whole training run."""
    scores = read_history(RunFolder(stage.folder).history)
    return Curve(tuple(s.accuracy for s in scores), tuple(s.loss for s in scores), scores[-1].n)


def reported(stages: Sequence[Stage]) -> dict[str, float]:
    """Means over the recorded replies of what their defense said; none without a defense."""
    told: dict[str, list[float]] = {}
    for stage in stages:
        for spec, stats in TruthVault(RunFolder(stage.folder).truth).defenses():
            for name in stats.keys() - BOOKKEEPING if spec else ():
                told.setdefault(name, []).append(stats[name])
    return {name: statistics.fmean(values) for name, values in sorted(told.items())}


def round_seconds(stage: Stage) -> list[float]:
    """Seconds of each round, training and evaluation; the first, in which Ray starts, is left out.

    The only round of a run of one round is better than none.
    """
    text = RunFolder(stage.folder).history.read_text(encoding="utf-8")
    ends = [_Timed.model_validate_json(line).seconds for line in text.splitlines() if line]
    spans = [after - before for before, after in pairwise(ends)]
    return spans[1:] or spans


def upload_bytes(stage: Stage) -> list[int]:
    """Bytes of each recorded reply, as received."""
    return [entry.bytes for entry in Recording(RunFolder(stage.folder).recording).entries()]

"""The folder tree of a sweep, which is all the state it has.

::

    points/<point>/seed-<s>/train-<digest>/     a whole training run, under its final name
                            record-<digest>/    a whole recorded run, and the results of attacks
                            <attack>-<digest>.json   which results an attack made, or which
                                                     measurements a list of metrics

A stage is computed in ``<name>.partial`` and renamed when it is whole, so whatever has its
final name is finished. The digest covers every setting that decides the numbers: a changed
sweep file gets new folders for what changed, and finds the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fl_privacy.recording import Recording
from fl_privacy.report.reading import read_history
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import RunSettings, Scalar, parse_settings
from fl_privacy.sweep.filling import CLIENTS, FROM_TRAINED, plain, settled, values_of
from fl_privacy.sweep.grid import Point, Sweep, slug
from fl_privacy.sweep.offline import Attack, Measure
from fl_privacy.sweep.reading import SweepError

DEFAULT_CLIENTS = 10


@dataclass(frozen=True)
class Stage:
    """One simulation: its folder, its run settings, its clients, and where it starts from."""

    kind: Literal["train", "record"]
    folder: Path
    settings: Mapping[str, Scalar]
    clients: int
    start: Stage | None = None

    @property
    def partial(self) -> Path:
        """Where it is computed until it is whole."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    @property
    def config(self) -> dict[str, Scalar]:
        """Its run config, with the parameters to start from."""
        if self.start is None:
            return dict(self.settings)
        return {**self.settings, "initial-model": str(RunFolder(self.start.folder).model)}

    @property
    def parsed(self) -> RunSettings:
        """Its run config, typed."""
        return parse_settings(self.config)

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        return self.folder.is_dir() and self.whole(self.folder)

    def whole(self, folder: Path) -> bool:
        """Whether ``folder`` holds every round of it and its last model."""
        run = RunFolder(folder)
        rounds = [score.round for score in read_history(run.history)]
        wanted = list(range(int(self.parsed.num_server_rounds) + 1))
        return rounds == wanted and run.model.exists() and run.manifest.exists()

    def perform(self, simulate: Callable[[Path], None]) -> None:
        """Compute it from its beginning, so that an interruption changes no number.

        Raises:
            SweepError: the simulation left it incomplete, or something else has its name.
        """
        if self.folder.exists():
            raise SweepError(
                f"{self.folder}: incomplete, though only finished runs get that name; remove it "
                f"and repeat the command, which computes it again"
            )
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        simulate(self.partial)
        if not self.whole(self.partial):
            raise SweepError(f"{self.partial}: the run ended before its last round; see its log")
        if self.kind == "record":
            check_all_answered(self.partial)
        self.partial.rename(self.folder)


def check_all_answered(run: Path) -> None:
    """Refuse a recording in which clients failed: every defense is to meet the same targets.

    Raises:
        SweepError: says how many, and why the first did.
    """
    failed = list(Recording(RunFolder(run).recording).entries(status="error"))
    if failed:
        raise SweepError(
            f"{run}: {len(failed)} of the recorded replies are errors, so targets are missing "
            f"(the first: {failed[0].status}); see its log, and repeat the command, which "
            f"records again"
        )


@dataclass(frozen=True)
class Cell:
    """One point at one seed: what is trained, what is recorded, what attacks and measures it.

    The texts of attacks and measures are filled in for it.
    """

    point: Point
    seed: int
    folder: Path
    train: Stage | None
    record: Stage | None
    attacks: tuple[Attack, ...]
    measures: tuple[Measure, ...] = ()

    @property
    def stages(self) -> list[Stage]:
        """Its simulations; one when a single run serves both purposes."""
        found = [stage for stage in (self.train, self.record) if stage is not None]
        return found[:1] if len({stage.folder for stage in found}) == 1 else found

    def answer(self, asked: Attack | Measure) -> Path:
        """The file that says which results an attack made, or which measurements were."""
        assert self.record is not None
        kind = "attack" if isinstance(asked, Attack) else "measure"
        identity = {kind: asked.identity, "of": self.record.folder.name}
        return self.folder / f"{slug(asked.title)}-{short_digest(identity)}.json"


def cells_of(sweep: Sweep, out: Path) -> list[Cell]:
    """Every point at every seed, in the order of the file, all seeds of a point together."""
    return [
        _cell(sweep, point, seed, out / "points" / point.name / f"seed-{seed}")
        for point in sweep.points()
        for seed in sweep.seeds
    ]


def _cell(sweep: Sweep, point: Point, seed: int, folder: Path) -> Cell:
    own = {**dict(point.axes), "client-defense": point.spec, "seed": seed}
    offline = bool(sweep.attacks or sweep.measures)
    train = None if sweep.train is None else settled({**sweep.run, **sweep.train, **own})
    whole = {**sweep.run, **(sweep.record or {}), **own} if offline else None
    record = None if whole is None else settled(whole)
    values = {} if whole is None else values_of(whole)
    attacks = tuple(attack.filled(values) for attack in sweep.attacks)
    measures = tuple(one.filled(values) for measure in sweep.measures for one in measure.each())
    audited = None if record is None else {"audit": True, **record}
    if train == record and train is not None and audited is not None:
        both = _stage("train", folder, audited, None)
        return Cell(point, seed, folder, both, both, attacks, measures)
    trained = None if train is None else _stage("train", folder, sparingly(train), None)
    recorded = None if audited is None else _stage("record", folder, audited, trained)
    return Cell(point, seed, folder, trained, recorded, attacks, measures)


def sparingly(table: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """A training run records its first and last round, enough to know the size of an upload."""
    rounds = int(parse_settings(plain(table)).num_server_rounds)
    return {"record-rounds": "1" if rounds == 1 else f"1,{rounds}", **table}


def _stage(
    kind: Literal["train", "record"],
    folder: Path,
    table: Mapping[str, Scalar],
    trained: Stage | None,
) -> Stage:
    settings = parse_settings(plain(table)).model_dump(by_alias=True, exclude_defaults=True)
    clients = int(table.get(CLIENTS, DEFAULT_CLIENTS))
    start = trained if table.get(FROM_TRAINED) else None
    identity = {"settings": settings, "clients": clients, "from": start and start.folder.name}
    return Stage(kind, folder / f"{kind}-{short_digest(identity)}", settings, clients, start)


def short_digest(identity: Mapping[str, Any]) -> str:
    """The first 10 hexadecimal digits of the SHA-256 of what decides the numbers."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]

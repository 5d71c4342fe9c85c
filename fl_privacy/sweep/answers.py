"""What an attack or a list of metrics made at a point: a small file that names its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fl_privacy.recording_store import write_atomically
from fl_privacy.results import ResultSet
from fl_privacy.sweep.reading import SweepError

GUESS = "baseline"
"""The adversary that guesses."""


class Answer(BaseModel):
    """The results of one adversary: their folder, seen from the point's, and its targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    results: str
    keys: tuple[str, ...]

    def open(self, folder: Path) -> ResultSet:
        """The results themselves."""
        return ResultSet(folder / self.results, frozenset(self.keys))


class Answers(BaseModel):
    """All adversaries of one attack on one recording: the plain one first, the guess last.

    ``skipped``: who was left out, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    made: tuple[Answer, ...]
    skipped: tuple[tuple[str, str], ...] = ()


class Measured(BaseModel):
    """The files of measurements of one list of metrics, seen from the point's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    files: tuple[str, ...]


Made = TypeVar("Made", Answers, Measured)


def answer_of(label: str, results: ResultSet, folder: Path) -> Answer:
    """The answer that points at ``results``, which lie below ``folder``."""
    place = results.folder.relative_to(folder).as_posix()
    return Answer(label=label, results=place, keys=tuple(row["key"] for row in results.rows()))


def write_answers(path: Path, found: Answers) -> None:
    """Write them as a whole: a file that is there says that the attack is finished."""
    _write(path, found)


def write_measured(path: Path, made: Sequence[Path], seconds: float) -> None:
    """Write which measurements, below the folder of ``path``, a finished list of metrics made."""
    files = tuple(file.relative_to(path.parent).as_posix() for file in made)
    _write(path, Measured(seconds=round(seconds, 3), files=files))


def _write(path: Path, made: Answers | Measured) -> None:
    write_atomically([(path, made.model_dump_json(indent=2).encode() + b"\n")])


def read_answers(path: Path) -> Answers | None:
    """The answers in a file; None when the attack is not finished.

    Raises:
        SweepError: the file is damaged.
    """
    return _read(path, Answers)


def read_measured(path: Path) -> Measured | None:
    """The measurements that a file names; None when not all of them are made.

    Raises:
        SweepError: the file is damaged.
    """
    return _read(path, Measured)


def _read(path: Path, kind: type[Made]) -> Made | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise SweepError(
            f"{path}: damaged ({error.errors()[0]['msg']}); remove it and repeat the command, "
            f"which finds the results again"
        ) from None

"""The history of a run: how good its global model was, one JSON line a round."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fl_privacy.recording_store import write_atomically
from fl_privacy.run_folder import RunFolderError, open_private


def begin_attempt(path: Path, attempt: int) -> None:
    """Make room for ``attempt``, so that each attempt and round has one line at most.

    A run that ends before it records a reply leaves lines of an attempt that the next one
    takes for its own; they go, and so does a line that a kill cut off.

    Raises:
        RunFolderError: a line cannot be read.
    """
    if not path.exists():
        return
    earlier = [json.dumps(line) for line in read_lines(path) if line["attempt"] < attempt]
    write_atomically([(path, "".join(f"{line}\n" for line in earlier).encode())])


def completed_rounds(path: Path) -> list[tuple[int, int]]:
    """Attempt and round of every aggregate; not of the initial model.

    Raises:
        RunFolderError: a line cannot be read.
    """
    return [(line["attempt"], line["round"]) for line in read_lines(path) if line["round"]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a history, none if there is none.

    Raises:
        RunFolderError: a line cannot be read.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "attempt": int(line["attempt"]), "round": int(line["round"])})
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{path}: line {number} is damaged ({error}); repair or remove the file"
            ) from None
    return lines


def add_round(
    path: Path, attempt: int, round: int, scores: Mapping[str, float], *, kept: bool = True
) -> None:
    """Append the ``scores`` of the global model after a round, as a whole line or not at all.

    The line says so if the model itself could not be ``kept``.
    """
    lost = {} if kept else {"kept": False}
    line = json.dumps({"attempt": attempt, "round": round, **scores, **lost})
    whole = path.stat().st_size if path.exists() else 0
    try:
        with open_private(path) as file:
            file.write(f"{line}\n")
    except OSError:
        with suppress(OSError):
            os.truncate(path, whole)
        raise

"""What ``attack --adaptive`` did not run and why, kept for the report beside the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fl_privacy.recording_store import write_atomically
from fl_privacy.results import ResultError
from fl_privacy.run_folder import RunFolder

FILE = "left-out.json"

Reasons = list[tuple[str, str]]
"""Names of adaptations, each with the reason."""

_KEPT: TypeAdapter[dict[str, Reasons]] = TypeAdapter(dict[str, Reasons])


def write_left_out(run: Path, adversary: str, reasons: Sequence[tuple[str, str]]) -> None:
    """Keep what was left out of the latest adaptive attack of ``adversary``, in place of before.

    Raises:
        ResultError: the file cannot be written, or what is there is damaged.
    """
    path = RunFolder(run).results / FILE
    kept = {**read_left_out(run), adversary: list(reasons)}
    try:
        write_atomically([(path, _KEPT.dump_json(kept, indent=2))])
    except OSError as error:
        raise ResultError(
            f"{path}: cannot be written ({error.strerror}); expected a run folder that is "
            f"writable and has room"
        ) from None


def read_left_out(run: Path) -> dict[str, Reasons]:
    """What was left out of the adaptive attacks of each adversary; empty when there were none.

    Raises:
        ResultError: the file is damaged.
    """
    path = RunFolder(run).results / FILE
    try:
        return _KEPT.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError):
        raise ResultError(f"{path}: damaged; remove it and repeat attack --adaptive") from None

"""Everything a report is made of, read from a run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.left_out import Reasons, read_left_out
from fl_privacy.recording import Entry, Manifest, Recording
from fl_privacy.report.gallery import TruthOf
from fl_privacy.report.scores import Analysis, analyses
from fl_privacy.results import load_results, nodes_of, rounds_of
from fl_privacy.run_folder import RunFolder
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange, Samples


class ReportError(ValueError):
    """A run folder that no report can be made of."""


class RoundScore(BaseModel):
    """The global model on ``n`` test images after a round."""

    model_config = ConfigDict(frozen=True)

    attempt: int = Field(default=1, ge=1)
    round: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    loss: float | None = None
    n: int = Field(ge=0)


@dataclass(frozen=True)
class Run:
    """A run as the report sees it.

    ``updates`` counts the recorded replies by round, ``lost`` the failures by reason;
    ``truth_of`` is None when the run was no audit; ``batch_norm``: the network has it;
    ``left_out``: adaptations without results of their own, by the adversary that adapts.
    """

    path: Path
    manifest: Manifest
    updates: Mapping[int, int]
    lost: Mapping[str, int]
    analyses: list[Analysis]
    truth_of: TruthOf | None
    history: list[RoundScore]
    batch_norm: bool
    left_out: Mapping[str, Reasons] = field(default_factory=dict)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        RecordingError, ResultError, ReportError: something in it is missing or damaged.
    """
    folder = RunFolder(path)
    recording = Recording(folder.recording)
    entries = list(recording.entries(status=None))
    replies = [entry for entry in entries if entry.ok]
    return Run(
        path=path,
        manifest=recording.manifest,
        updates=Counter(entry.round for entry in replies),
        lost=Counter(entry.status for entry in entries if not entry.ok),
        analyses=analyses(load_results(path)),
        truth_of=_truth_of(TruthVault(folder.truth)) if folder.truth.is_dir() else None,
        history=read_history(folder.history),
        batch_norm=_has_batch_norm(recording, replies),
        left_out=read_left_out(path),
    )


def read_history(path: Path) -> list[RoundScore]:
    """Accuracy by round; an unterminated last line (a run that was killed) is left out.

    Raises:
        ReportError: another line cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [RoundScore.model_validate_json(line) for line in lines if line.strip()]
    except ValidationError as error:
        raise ReportError(
            f'{path}: expected lines such as {{"round": 1, "accuracy": 0.5, "loss": 1.2, '
            f'"n": 500}}, got {error.errors()[0]["input"]!r}; repair or remove the file'
        ) from None


def _truth_of(vault: TruthVault) -> TruthOf:
    """Look up the samples behind a target by its row."""

    def truth_of(row: Mapping[str, Any]) -> Samples | None:
        members = [
            _exchange(row["attempt"] or 1, round, node)
            for round in rounds_of(row)
            for node in nodes_of(row["node"] or "")
            if node
        ]
        if not members or not all(vault.has(exchange) for exchange in members):
            return None
        return vault.samples(members)

    return truth_of


def _exchange(attempt: int, round: int, node: str) -> Exchange:
    """An exchange without its tensors, under which the vault keeps its truth."""
    return Exchange(
        attempt=attempt,
        round=round,
        node=node,
        num_examples=None,
        digest="",
        global_digest="",
        parameters={},
        buffers={},
        update={},
        returned_buffers={},
    )


def _has_batch_norm(recording: Recording, replies: list[Entry]) -> bool:
    """Whether the first reply holds running statistics, which are batch norm's."""
    if not replies:
        return False
    names = recording.schema(replies[0].schema_digest).names
    return any(name.rpartition(".")[2] == "running_mean" for name in names)

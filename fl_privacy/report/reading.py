"""Everything a report is made of, read from a run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.recording import Entry, Manifest, Recording
from fl_privacy.report.gallery import TruthOf
from fl_privacy.report.scores import Analysis, analyses
from fl_privacy.results import load_results
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import digest
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange, Samples


class ReportError(ValueError):
    """A run folder that no report can be made of."""


class RoundScore(BaseModel):
    """The global model on ``n`` test images after a round."""

    model_config = ConfigDict(frozen=True)

    round: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    loss: float | None = None
    n: int = Field(ge=0)


@dataclass(frozen=True)
class Run:
    """A run as the report sees it.

    ``updates`` counts the recorded replies by round, ``lost`` the failures by reason;
    ``truth_of`` is None when the run was no audit.
    """

    path: Path
    manifest: Manifest
    updates: Mapping[int, int]
    lost: Mapping[str, int]
    analyses: list[Analysis]
    truth_of: TruthOf | None
    history: list[RoundScore]


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
        truth_of=_truth_of(folder, replies) if folder.truth.is_dir() else None,
        history=read_history(folder.history),
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


def _truth_of(folder: RunFolder, replies: list[Entry]) -> TruthOf:
    """Look up the samples behind a target by its key."""
    members = dict(_targets(replies))
    vault = TruthVault(folder.truth)

    def truth_of(key: str) -> Samples | None:
        exchanges = [_exchange(entry) for entry in members.get(key, ())]
        if not exchanges or not all(vault.has(exchange) for exchange in exchanges):
            return None
        return vault.samples(exchanges)

    return truth_of


def _targets(replies: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Key and members of every target the threat model's units make of whole recordings."""
    for entry in replies:
        yield digest("update", entry.sha256), [entry]
    by_client = sorted(replies, key=lambda e: (e.attempt, e.node))
    for _, group in groupby(by_client, key=lambda e: (e.attempt, e.node)):
        client = list(group)
        yield digest("client", *(e.sha256 for e in client)), client
    by_round = sorted(replies, key=lambda e: (e.attempt, e.round))
    for _, group in groupby(by_round, key=lambda e: (e.attempt, e.round)):
        whole = list(group)
        yield digest("aggregate", digest(*(e.sha256 for e in whole))), whole


def _exchange(entry: Entry) -> Exchange:
    """The exchange of an index line, without its tensors."""
    return Exchange(
        attempt=entry.attempt,
        round=entry.round,
        node=entry.node,
        num_examples=entry.num_examples,
        digest=entry.sha256,
        global_digest=entry.global_digest,
        parameters={},
        buffers={},
        update={},
        returned_buffers={},
    )

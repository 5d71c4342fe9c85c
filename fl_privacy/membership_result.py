"""What a membership audit found, as it is written: epsilon's two sides, and all behind them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.metrics.epsilon_bound import epsilon_from_counts
from fl_privacy.recording_store import write_atomically
from fl_privacy.types import LocalTraining, NonNegativeFloat, PositiveInt

FOLDER = "membership"
"""Where a run folder holds them: a file for each configuration."""


CONFIGURATION = (
    *("defense", "model", "dataset", "training", "samples", "rounds"),
    *("accountant", "delta", "confidence", "trials", "seed"),
)
"""What an audit was asked for."""


class MembershipError(ValueError):
    """A membership audit that cannot be run as asked, or a result that cannot be read."""


class MembershipResult(BaseModel):
    """One audit: the guarantee beside what a membership test shows.

    ``epsilon`` is the accountant's at ``delta``, None where nothing is guaranteed; ``bound`` the
    empirical lower bound, which holds with probability ``confidence``. ``trials`` is the number
    in each of the two worlds, half of which chose the threshold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    created: str
    defense: str
    model: str
    dataset: str
    training: LocalTraining
    neighbors: Literal["removed", "replaced"]
    samples: PositiveInt
    rounds: PositiveInt
    steps: PositiveInt
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: NonNegativeFloat | None
    epsilon: NonNegativeFloat | None
    accountant: str
    delta: Annotated[float, Field(gt=0, lt=1)]
    bound: NonNegativeFloat
    confidence: Annotated[float, Field(gt=0, lt=1)]
    trials: PositiveInt
    threshold: float
    true_positives: tuple[int, int]
    false_positives: tuple[int, int]
    seed: int
    seconds: NonNegativeFloat
    versions: dict[str, str]
    code_digest: str

    @property
    def file_name(self) -> str:
        """The same for the same configuration, which says all but what came out of it."""
        asked = self.model_dump(mode="json", include=set(CONFIGURATION))
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return f"{digest[:16]}.json"

    @property
    def largest_bound(self) -> float:
        """What the number of trials can show at most: that of a test that is never wrong."""
        n, m = self.true_positives[1], self.false_positives[1]
        most = epsilon_from_counts(n, n, 0, m, delta=self.delta, confidence=self.confidence)
        return float(most)

    @property
    def violated(self) -> bool:
        """Whether the guarantee was seen to be broken."""
        return self.epsilon is not None and self.bound > self.epsilon


def write_result(path: Path, result: MembershipResult) -> None:
    """Write one result as JSON, for the owner alone.

    Raises:
        MembershipError: the file cannot be written.
    """
    try:
        write_atomically([(path, result.model_dump_json(indent=2).encode())])
    except OSError as error:
        raise MembershipError(
            f"{path}: cannot be written ({error.strerror}); name a file in a writable folder"
        ) from None


def results_of(run: Path) -> list[MembershipResult]:
    """All that a run folder holds, the oldest first.

    Raises:
        MembershipError: one is damaged, or of another version.
    """
    found = [read_result(path) for path in sorted((run / FOLDER).glob("*.json"))]
    return sorted(found, key=lambda result: result.created)


def read_result(path: Path) -> MembershipResult:
    """The result at ``path``.

    Raises:
        MembershipError: it is missing, damaged, or of another version.
    """
    try:
        fields: Any = json.loads(path.read_bytes())
        return MembershipResult.model_validate(fields)
    except (OSError, ValueError, ValidationError) as error:
        raise MembershipError(
            f"{path}: no membership result ({error}); repeat fl-privacy membership"
        ) from None

"""What a membership audit found, as it is written: epsilon's two sides, and all behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.recording_store import write_atomically
from fl_privacy.types import LocalTraining, NonNegativeFloat, PositiveInt

FILE = "membership.json"
"""Its name in a run folder."""


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


def read_result(path: Path) -> MembershipResult | None:
    """The result at ``path``; None when there is none.

    Raises:
        MembershipError: it is damaged, or of another version.
    """
    try:
        fields: Any = json.loads(path.read_bytes())
        return MembershipResult.model_validate(fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise MembershipError(
            f"{path}: no membership result ({error}); repeat fl-privacy membership"
        ) from None

"""What a client's differential privacy has cost so far: the file it keeps, as it is written.

A client writes it, in a folder of its own; the report reads those of a simulation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.types import NonNegativeFloat, PositiveInt

FILE = "privacy.json"


class SpentError(ValueError):
    """A file of privacy spent that cannot be used; the message names it and the remedy."""


class NoisySteps(BaseModel):
    """``count`` steps of the Poisson-subsampled Gaussian mechanism.

    ``noise_multiplier`` is the noise's standard deviation over the clipping norm;
    ``sample_rate`` the probability with which each sample enters a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    noise_multiplier: NonNegativeFloat
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    count: PositiveInt


class PrivacySpent(BaseModel):
    """All steps of one client, and the epsilon at delta that they amount to.

    ``epsilon`` is None when there is no guarantee, as without noise. Equal steps are
    counted together: their order does not matter to composition.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    participations: Annotated[int, Field(ge=0)] = 0
    steps: tuple[NoisySteps, ...] = ()
    epsilon: NonNegativeFloat | None = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None

    def plus(self, more: NoisySteps) -> tuple[NoisySteps, ...]:
        """The steps after one more participation of ``more``."""
        counts = {(s.noise_multiplier, s.sample_rate): s.count for s in self.steps}
        key = (more.noise_multiplier, more.sample_rate)
        counts[key] = counts.get(key, 0) + more.count
        return tuple(
            NoisySteps(noise_multiplier=noise, sample_rate=rate, count=count)
            for (noise, rate), count in counts.items()
        )


def read_spent(path: Path) -> PrivacySpent:
    """What the file at ``path`` says; nothing spent when there is none.

    Raises:
        SpentError: it exists and cannot be read, is damaged, or of another version.
    """
    try:
        return PrivacySpent.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return PrivacySpent()
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise SpentError(
            f"{path}: cannot be read as privacy spent ({reason}), so nobody knows what this "
            f"client may still give away; restore the file from a backup, or stop using this data"
        ) from None

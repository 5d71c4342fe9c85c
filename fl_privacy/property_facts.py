"""What is known of a property before anything is inferred of it: its name, and phi."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from fl_privacy.datasets.properties import Phi, PropertyError, secret_property
from fl_privacy.types import Samples


class PropertyFacts(BaseModel):
    """Name of a property, and how closely it goes together with the labels of the main task.

    ``phi`` over ``n`` samples, None where their labels are all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    phi: float | None
    n: int

    def __str__(self) -> str:
        """``phi of smiling to the main task +0.310 (n = 400), above 0.2: not unrelated``."""
        if self.phi is None:
            return f"phi of {self.name} to the main task unknown: one label (n = {self.n})"
        return f"phi of {self.name} to the main task {Phi(self.phi, self.n)}"


def facts_of(samples: Samples | None, name: str) -> PropertyFacts | None:
    """What the samples tell of a property; None where nothing can be inferred of it with them."""
    if samples is None:
        return None
    try:
        found = secret_property(samples, name)
    except PropertyError:
        return None
    value, n = found.relation
    return PropertyFacts(name=found.name, phi=value if math.isfinite(value) else None, n=n)

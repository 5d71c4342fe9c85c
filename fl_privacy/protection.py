"""The layers to withhold, as they are written: the choice, what adversaries get, the settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.layer_results import Source
from fl_privacy.recording_store import write_atomically
from fl_privacy.results import MetricInfo
from fl_privacy.threat_model import ThreatModel

FOLDER = "protection"
"""Where a run folder holds all of it: a folder for each choice of layers."""

RESULT = "protection.json"


class ProtectionError(ValueError):
    """A choice of layers that cannot be made, or a result that cannot be read."""


class Measured(BaseModel):
    """One score of one adversary: mean with its 95 % interval; NaN where there is none.

    ``n`` counts targets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    mean: float
    low: float
    high: float
    n: int


class Spread(BaseModel):
    """One score under several sets of random layers: mean, lowest and highest over ``n`` sets."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    mean: float
    lowest: float
    highest: float
    n: int


class Comparison(BaseModel):
    """One score with nothing withheld, with the chosen layers, and with random ones.

    ``better``: how much less the adversary gets with the chosen layers withheld than, in the mean,
    with the random ones; the interval is over the targets, the same for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adversary: str
    metric: MetricInfo
    nothing: Measured
    chosen: Measured
    random: Spread
    better: Measured
    failed: str = ""


class Protection(BaseModel):
    """The layers to withhold: how they were ranked, and what adversaries get then.

    ``ranking`` holds every layer with the number it was ranked by, the leakiest first, ``averaged``
    what that is the mean of, measured on samples of ``source``, and ``unranked`` the layers that
    have no such number and so were in no choice; ``sets`` are the random layers they are compared
    with, all others there are where ``every_set``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format_version: Literal[2] = 2
    budget: Annotated[int, Field(ge=1)]
    by: str
    unit: str
    ranking: tuple[tuple[str, float], ...]
    source: Source = "none"
    averaged: tuple[str, ...] = ()
    unranked: tuple[str, ...] = ()
    layers: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...] = ()
    every_set: bool = False
    comparisons: tuple[Comparison, ...] = ()
    seed: int
    recording_digest: str
    code_digest: str
    created: str

    @property
    def defense(self) -> str:
        """The spec of the defense that withholds them."""
        return f"withhold(layers={self.layers!r})"


def configuration(layers: Sequence[str], threat_model: ThreatModel) -> dict[str, str]:
    """The files that withhold ``layers``: a client's defense, and what a server then sees."""
    defense = f"withhold(layers={tuple(layers)!r})"
    hidden = tuple(dict.fromkeys((*threat_model.withheld, *layers)))
    known = threat_model.model_copy(update={"withheld": hidden})
    told = known.model_dump(mode="json", exclude_defaults=True, exclude={"training"})
    if threat_model.training is not None:
        told["training"] = threat_model.training.model_dump(mode="json", exclude_defaults=True)
    lines = [line for name, value in told.items() for line in toml(name, value)]
    return {
        "client-defense.toml": f"client-defense = {json.dumps(defense)}\n",
        "threat-model.toml": "".join(f"{line}\n" for line in lines),
    }


def toml(name: str, value: Any) -> list[str]:
    """``name = value`` in TOML, which reads single values and lists as JSON writes them."""
    if isinstance(value, dict):
        return [f"{name}.{key} = {json.dumps(part)}" for key, part in value.items()]
    return [f"{name} = {json.dumps(value)}"]


def write_protection(run: Path, found: Protection, threat_model: ThreatModel) -> Path:
    """Write the choice and its configuration files; the folder they are in.

    Raises:
        ProtectionError: they cannot be written.
    """
    name = "-".join(("".join(c if c.isalnum() else "-" for c in found.by)).split("-"))
    folder = run / FOLDER / f"{found.budget}-by-{name}"
    files = {
        RESULT: found.model_dump_json(indent=2) + "\n",
        **configuration(found.layers, threat_model),
    }
    try:
        write_atomically([(folder / file, text.encode()) for file, text in files.items()])
    except OSError as error:
        raise ProtectionError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); expected a run "
            f"folder that is writable and has room, copy the run to one"
        ) from None
    return folder


def protections(run: Path) -> list[Protection]:
    """All that a run holds, by budget.

    Raises:
        ProtectionError: one is damaged.
    """
    found = []
    for path in sorted((run / FOLDER).glob(f"*/{RESULT}")):
        try:
            found.append(Protection.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            raise ProtectionError(
                f"{path}: damaged, or of another version; remove it and repeat fl-privacy protect"
            ) from None
    return sorted(found, key=lambda one: (one.budget, one.by))

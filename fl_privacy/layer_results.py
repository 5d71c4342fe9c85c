"""What one layer metric found at recorded global models, as it is written and read back.

A run holds ``layers/<metric>-<digest>.json`` for each measurement: what was asked for, on which
data, and a row a layer. A measurement that is there is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from fl_privacy.property_facts import PropertyFacts
from fl_privacy.recording_store import write_atomically
from fl_privacy.types import LayerScores, NonNegativeFloat, Samples, Task

FOLDER = "layers"
"""Where a run folder holds them."""

Source = Literal["none", "auxiliary", "audit"]
"""Whose samples were measured on: nobody's, the adversary's, or the clients' own."""


class LayerResultError(ValueError):
    """A measurement that cannot be read or written, or a metric that broke its protocol."""


class MeasureConfig(BaseModel):
    """Everything that decides the numbers of one measurement.

    ``metric`` is the spec that makes it, ``name`` its component name. ``data`` names the samples
    in words, ``data_digest`` covers their content, ``targets_digest`` the updates; ``rounds`` are
    written ``attempt:round``. ``relation`` is what the samples tell of the property.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    metric: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    settings: dict[str, JsonValue]
    needs: Literal["updates", "property", "data"]
    source: Source
    data: str
    data_digest: str
    samples: int
    rounds: tuple[str, ...]
    updates: int
    targets_digest: str
    model: str
    task: Task
    threat_model: dict[str, JsonValue]
    seed: int
    device: str
    threads: int
    recording_digest: str
    code_digest: str
    versions: dict[str, str]
    relation: PropertyFacts | None = None

    @property
    def about(self) -> str:
        """The property that it is about; empty for none."""
        return str(self.settings.get("property") or "")

    @property
    def file_name(self) -> str:
        """``<metric>-<first 8 digits of the digest>.json``."""
        return f"{self.name}-{self.digest[:8]}.json"

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Measurement(BaseModel):
    """One value for each layer, and whatever the metric tells beside it.

    ``standard_errors`` is empty where the metric gives none; ``columns`` hold one number a layer
    each. Numbers that are infinite or none at all are kept as such. ``auxiliary`` is what named
    the adversary's data on the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    config: MeasureConfig
    unit: Annotated[str, Field(min_length=1)]
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    values: tuple[float, ...]
    standard_errors: tuple[float, ...] = ()
    n: int = 0
    columns: dict[str, tuple[float, ...]] = {}
    auxiliary: str = ""
    seconds: NonNegativeFloat
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @model_validator(mode="after")
    def _a_number_a_layer(self) -> Self:
        given = {"values": self.values, **self.columns}
        if self.standard_errors:
            given["standard errors"] = self.standard_errors
        for name, column in given.items():
            if len(column) != len(self.layers):
                raise ValueError(
                    f"{name}: expected {len(self.layers)} numbers, one a layer, got {len(column)}"
                )
        return self


def measurement(
    config: MeasureConfig, scores: LayerScores, seconds: float, *, auxiliary: str = ""
) -> Measurement:
    """The scores of a metric as they are written.

    Raises:
        LayerResultError: they are not one number for each layer.
    """

    def numbers(tensor: torch.Tensor) -> tuple[float, ...]:
        return tuple(tensor.detach().double().flatten().tolist())

    errors = scores.standard_errors
    try:
        return Measurement(
            config=config,
            unit=scores.unit,
            layers=scores.layers,
            values=numbers(scores.values),
            standard_errors=() if errors is None else numbers(errors),
            n=scores.n,
            columns={name: numbers(column) for name, column in scores.columns.items()},
            auxiliary=auxiliary,
            seconds=seconds,
        )
    except ValidationError as error:
        raise LayerResultError(f"{config.metric}: {error.errors()[0]['msg']}") from None


def samples_digest(samples: Samples) -> str:
    """SHA-256 of the content of samples: inputs, labels, properties and people."""
    total = hashlib.sha256()
    tensors = [("inputs", samples.inputs), ("labels", samples.labels)]
    tensors += [(f"property {name}", values) for name, values in samples.properties.items()]
    tensors += [] if samples.people is None else [("people", samples.people)]
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def keys_digest(keys: Sequence[str]) -> str:
    """SHA-256 of the keys of targets, in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def write_measurement(run: Path, found: Measurement) -> Path:
    """Write a measurement into a run folder, for its owner alone; as a whole or not at all.

    Raises:
        LayerResultError: it cannot be written.
    """
    path = run / FOLDER / found.config.file_name
    try:
        write_atomically([(path, found.model_dump_json(indent=2).encode() + b"\n")])
    except OSError as error:
        raise LayerResultError(
            f"{path}: cannot be written ({error.strerror}); expected a run folder that is "
            f"writable and has room, copy the run to one"
        ) from None
    return path


def read_measurement(path: Path) -> Measurement:
    """The measurement at ``path``.

    Raises:
        LayerResultError: it is damaged, or of another version.
    """
    try:
        return Measurement.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise LayerResultError(
            f"{path}: no measurement of format version 1 ({why}); remove it and repeat "
            f"fl-privacy measure"
        ) from None


def measured_before(run: Path, config: MeasureConfig) -> Measurement | None:
    """The same measurement, if the run holds it already."""
    path = run / FOLDER / config.file_name
    held = read_measurement(path) if path.exists() else None
    return held if held is not None and held.config == config else None


def measurements(run: Path) -> list[Measurement]:
    """All measurements of a run, by metric, property and rounds, the oldest first.

    Raises:
        LayerResultError: one is damaged.
    """
    found = [read_measurement(path) for path in sorted((run / FOLDER).glob("*.json"))]
    return sorted(found, key=_place)


def _place(found: Measurement) -> tuple[Any, ...]:
    c = found.config
    rounds = tuple(tuple(int(part) for part in r.split(":")) for r in c.rounds)
    return rounds, c.source, c.name, c.about, c.metric, found.created, c.digest


def by_layer(found: Measurement) -> Mapping[str, float]:
    """Layer -> value, where that is a number."""
    pairs = zip(found.layers, found.values, strict=True)
    return {layer: value for layer, value in pairs if math.isfinite(value)}

"""What stands in a result folder: its configuration, its columns, and its chunks as bytes."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from fl_privacy.property_facts import PropertyFacts
from fl_privacy.types import Reconstruction, Task

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]

COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "attempt": pa.int64(),
    "round": pa.int64(),
    "rounds": pa.string(),
    "node": pa.string(),
    "images": pa.int64(),
    "status": pa.string(),
    "message": pa.string(),
    "loss": pa.float64(),
    "seconds": pa.float64(),
    "defense": pa.string(),
    "labels": pa.string(),
}
"""Columns of every result table; one float64 column a metric follows.

A target's members are the nodes of ``node``, joined by ``+``, in each of its ``rounds``, joined
by ``,``; ``round`` is the last of these.
"""

HAS_PROPERTY = "has_property"
"""Column beside those of set-level metrics: whether each exchange has the property in truth."""


class ResultError(ValueError):
    """Results that cannot be read, or belong to another analysis."""


class MetricInfo(BaseModel):
    """A metric's name, unit and direction; ``spec`` makes it, with all that was filled in.

    The column of a ``set_level`` one holds what a target adds to the set (`property_rows`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    unit: str
    higher_is_leakier: bool
    spec: str = ""
    set_level: bool = False

    @property
    def is_share(self) -> bool:
        """Whether its values are shares, in [0, 1]: its unit says so."""
        return self.unit.startswith("share")


class ResultConfig(BaseModel):
    """Everything that decides what an analysis computes, and where it ran.

    ``adversary`` is the spec that makes it, ``name`` its component name, ``settings`` all its
    hyperparameters, defaults too; ``requires`` names what it needs of an observation. ``model``
    is what the attack differentiated; ``threads`` are torch's; ``oracle`` names what was
    granted beyond what a server sees; ``adaptation`` says what was changed because the defense is
    known, and why; ``relation`` is what the auxiliary data tells of the property that is
    inferred. Results that are older than a field have its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    adversary: str
    settings: dict[str, JsonValue] = {}
    requires: tuple[str, ...] = ()
    model: str = ""
    task: Task | None = None
    threat_model: dict[str, JsonValue]
    seed: int
    device: str
    threads: int = 0
    width: int
    recording_digest: str
    code_digest: str = ""
    metrics: tuple[MetricInfo, ...] = ()
    oracle: tuple[str, ...] = ()
    adaptation: str = ""
    versions: dict[str, str] = {}
    relation: PropertyFacts | None = None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    complete: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the numbers, which `identity` gives."""
        return hashlib.sha256(
            json.dumps(self.identity(), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    @property
    def folder_name(self) -> str:
        """``<name>-<first 8 digits of the digest>``."""
        return f"{self.name}-{self.digest[:8]}"

    @property
    def about(self) -> str:
        """The property that was inferred; empty where none is named."""
        return self.relation.name if self.relation else str(self.settings.get("property") or "")

    def identity(self) -> dict[str, Any]:
        """What the digest covers: not ``created``, ``complete`` and remarks on the rest."""
        remarks = {"created", "complete", "adaptation", "relation"}
        return self.model_dump(mode="json", exclude=remarks)

    def columns(self) -> pa.Schema:
        """Schema of the result table."""
        scores = {m.name: pa.string() if m.set_level else pa.float64() for m in self.metrics}
        truth = {HAS_PROPERTY: pa.string()} if any(m.set_level for m in self.metrics) else {}
        return pa.schema(list({**COLUMNS, **scores, **truth}.items()))


def read_config(folder: Path) -> ResultConfig:
    """The configuration of the analysis in ``folder``.

    Raises:
        ResultError: it is missing or cannot be read.
    """
    path = folder / "config.json"
    try:
        return ResultConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ResultError(f"{folder} holds no results: there is no config.json") from None
    except ValidationError as error:
        raise ResultError(
            f"{path} cannot be read as results of format version 1: {error.errors()[0]['msg']}; "
            f"use the fl-privacy version that wrote it, or remove the folder"
        ) from None


def same_analysis(folder: Path, held: ResultConfig, wanted: ResultConfig) -> ResultConfig:
    """The configuration held in a folder, when it is that of the wanted analysis.

    Raises:
        ResultError: it is another one; names each difference.
    """
    old, new = held.identity(), wanted.identity()
    differences = [
        f"{name}: holds {old[name]!r}, wanted {new[name]!r}"
        for name in old
        if old[name] != new[name]
    ]
    if differences:
        raise ResultError(
            f"{folder} holds another analysis ({'; '.join(differences)}); "
            f"choose another folder or remove this one"
        )
    return held


def rounds_of(row: Mapping[str, Any]) -> list[int]:
    """The rounds behind a target; empty when they are unknown."""
    if row.get("rounds"):
        return [int(part) for part in row["rounds"].split(",")]
    return [] if row["round"] is None else [row["round"]]


def nodes_of(node: str) -> list[str]:
    """The clients behind a target, whose names an aggregate joins by ``+``."""
    return node.split("+")


def client_of(row: Mapping[str, Any]) -> Hashable:
    """Whose target a row is: those of one client are no independent draws.

    Its rounds may hold the same images, and always hold images of the same classes.
    """
    return row.get("attempt") or 1, row.get("node") or row["key"]


def chunks_in(folder: Path) -> list[Path]:
    """The chunks that count, in the order of writing."""
    return sorted((folder / "chunks").glob("*.parquet"))


def chunk_by_key(folder: Path, config: ResultConfig) -> dict[str, Path]:
    """Key of a target -> the chunk that holds it."""
    schema = config.columns()
    return {
        key: path
        for path in chunks_in(folder)
        for key in read_chunk(path, schema).column("key").to_pylist()
    }


def read_chunk(path: Path, schema: pa.Schema) -> pa.Table:
    """The rows of a chunk.

    Raises:
        ResultError: the file is damaged.
    """
    try:
        return pq.read_table(path, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise ResultError(
            f"{path} is damaged ({error}); remove it and run the analysis again, "
            f"which computes its targets anew"
        ) from None


def table_of(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table; what is missing or not a number becomes null."""
    clean = [{name: _null_if_nan(row.get(name)) for name in schema.names} for row in rows]
    return pa.Table.from_pylist(clean, schema=schema)


def _null_if_nan(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def tensors_of(reconstructions: Mapping[str, Reconstruction]) -> dict[str, Tensor]:
    """Named tensors of their own: safetensors takes neither strided nor shared memory."""
    tensors = {}
    for key, result in reconstructions.items():
        tensors[f"{key}.inputs"] = _own(result.inputs, torch.float32)
        tensors[f"{key}.labels"] = _own(result.labels, torch.int64)
    return tensors


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def config_bytes(config: ResultConfig) -> bytes:
    """A configuration as a JSON file."""
    return config.model_dump_json(indent=2).encode() + b"\n"

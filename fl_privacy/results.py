"""What one analysis writes, and how it is read back.

A run holds ``results/<name>-<digest>/`` for each analysis::

    config.json                 adversary, threat model, seed, digests, metrics, complete?
    chunks/000000.parquet       one row a target
    chunks/000000.safetensors   the reconstructions of those rows
    targets.parquet, .csv       all rows, written when the analysis is complete

A chunk counts once its ``.parquet`` is there, which is renamed into place after its
reconstructions: an analysis that was killed goes on after its last whole chunk.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fl_privacy.recording_store import write_atomically
from fl_privacy.types import Outcome, Reconstruction

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]

COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "attempt": pa.int64(),
    "round": pa.int64(),
    "node": pa.string(),
    "images": pa.int64(),
    "status": pa.string(),
    "message": pa.string(),
    "loss": pa.float64(),
    "seconds": pa.float64(),
    "defense": pa.string(),
    "labels": pa.string(),
}
"""Columns of every result table; one float64 column a metric follows."""


class ResultError(ValueError):
    """Results that cannot be read, or belong to another analysis."""


class MetricInfo(BaseModel):
    """A metric's name, unit and direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    unit: str
    higher_is_leakier: bool


class ResultConfig(BaseModel):
    """Everything that decides what an analysis computes, and where it ran.

    ``adversary`` is the spec that makes it, ``name`` its component name;
    ``model`` is what the attack differentiated; ``oracle`` names what was granted beyond
    what a server sees.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    adversary: str
    model: str = ""
    threat_model: dict[str, JsonValue]
    seed: int
    device: str
    width: int
    recording_digest: str
    metrics: tuple[MetricInfo, ...] = ()
    oracle: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    complete: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the numbers: all but ``created`` and ``complete``."""
        return hashlib.sha256(
            json.dumps(self.identity(), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    @property
    def folder_name(self) -> str:
        """``<name>-<first 8 digits of the digest>``."""
        return f"{self.name}-{self.digest[:8]}"

    def identity(self) -> dict[str, Any]:
        """What the digest covers."""
        return self.model_dump(mode="json", exclude={"created", "complete"})

    def columns(self) -> pa.Schema:
        """Schema of the result table."""
        scores = {metric.name: pa.float64() for metric in self.metrics}
        return pa.schema(list({**COLUMNS, **scores}.items()))


class ResultWriter:
    """Writes one analysis, chunk by chunk; made by `open`."""

    def __init__(self, folder: Path, config: ResultConfig) -> None:
        self._folder = folder
        self._config = config
        self._done = frozenset(_chunk_of(folder, config))

    @classmethod
    def open(cls, folder: Path, config: ResultConfig) -> Self:
        """Start an analysis in ``folder``, or go on with the one it holds.

        Raises:
            ResultError: the folder holds another analysis.
        """
        if (folder / "config.json").exists():
            config = _same(folder, read_config(folder), config)
        write_atomically([(folder / "config.json", _config_bytes(config))])
        return cls(folder, config)

    @property
    def done(self) -> frozenset[str]:
        """Keys of the targets that are written already."""
        return self._done

    def write_chunk(
        self, rows: Sequence[Row], reconstructions: Mapping[str, Reconstruction]
    ) -> None:
        """Add targets; when this returns they survive a crash.

        Raises:
            ResultError: a row has an unknown column or a key that is written already,
                or a reconstruction has no row.
        """
        keys = self._check(rows, reconstructions)
        if self._config.complete:
            self._mark(complete=False)
        last = max((int(path.stem) for path in _chunks(self._folder)), default=-1)
        stem = self._folder / "chunks" / f"{last + 1:06d}"
        write_atomically([(stem.with_suffix(".safetensors"), save(_tensors(reconstructions)))])
        write_atomically(
            [(stem.with_suffix(".parquet"), _parquet(_table(rows, self._config.columns())))]
        )
        self._done |= keys

    def finish(self) -> None:
        """Write ``targets.parquet`` and ``targets.csv`` and mark the analysis complete."""
        table = ResultSet(self._folder).table
        text = io.BytesIO()
        pa_csv.write_csv(table, text)
        exports = {"targets.parquet": _parquet(table), "targets.csv": text.getvalue()}
        write_atomically((self._folder / name, data) for name, data in exports.items())
        self._mark(complete=True)

    def _check(
        self, rows: Sequence[Row], reconstructions: Mapping[str, Reconstruction]
    ) -> frozenset[str]:
        names = self._config.columns().names
        unknown = sorted({name for row in rows for name in row} - set(names))
        if unknown:
            raise ResultError(f"unknown columns {unknown}; a row has {', '.join(names)}")
        keys = [key for row in rows if isinstance(key := row.get("key"), str) and key]
        if len(keys) < len(rows):
            raise ResultError("every row needs a key, the digest of its target")
        twice = sorted(key for key, n in Counter([*keys, *self._done]).items() if n > 1)
        if twice:
            raise ResultError(f"targets written twice: {', '.join(twice)}")
        strangers = sorted(set(reconstructions) - set(keys))
        if strangers:
            raise ResultError(f"reconstructions without a row: {', '.join(strangers)}")
        return frozenset(keys)

    def _mark(self, *, complete: bool) -> None:
        self._config = self._config.model_copy(update={"complete": complete})
        write_atomically([(self._folder / "config.json", _config_bytes(self._config))])


class ResultSet:
    """Reads one analysis, complete or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)

    @cached_property
    def table(self) -> pa.Table:
        """One row a target, in the order of writing."""
        schema = self.config.columns()
        return pa.concat_tables(
            [schema.empty_table(), *(_read(path, schema) for path in _chunks(self.folder))]
        )

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self.table.to_pylist()}

    @cached_property
    def _where(self) -> dict[str, Path]:
        return _chunk_of(self.folder, self.config)

    def rows(self) -> list[dict[str, Any]]:
        """The table as dictionaries, sorted by key."""
        return [self._rows[key] for key in sorted(self._rows)]

    def reconstruction(self, key: str) -> Reconstruction | None:
        """What the adversary made of a target; None when it failed or is not there."""
        if key not in self._where:
            return None
        path = self._where[key].with_suffix(".safetensors")
        with safe_open(path, framework="pt") as file:
            if f"{key}.inputs" not in file.keys():  # noqa: SIM118
                return None
            inputs, labels = file.get_tensor(f"{key}.inputs"), file.get_tensor(f"{key}.labels")
        row = self._rows[key]
        return Reconstruction(
            key=key,
            inputs=inputs,
            labels=labels,
            outcome=Outcome(row["status"], row["message"] or ""),
            loss=math.nan if row["loss"] is None else row["loss"],
            seconds=math.nan if row["seconds"] is None else row["seconds"],
        )


def load_results(run: Path) -> list[ResultSet]:
    """All analyses of a run, sorted by folder name; none when it has no results yet."""
    return [ResultSet(path.parent) for path in sorted((run / "results").glob("*/config.json"))]


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


def _same(folder: Path, held: ResultConfig, wanted: ResultConfig) -> ResultConfig:
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


def _chunks(folder: Path) -> list[Path]:
    return sorted((folder / "chunks").glob("*.parquet"))


def _chunk_of(folder: Path, config: ResultConfig) -> dict[str, Path]:
    schema = config.columns()
    return {
        key: path
        for path in _chunks(folder)
        for key in _read(path, schema).column("key").to_pylist()
    }


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(path, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise ResultError(
            f"{path} is damaged ({error}); remove it and run the analysis again, "
            f"which computes its targets anew"
        ) from None


def _table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table; what is missing or not a number becomes null."""
    clean = [{name: _null_if_nan(row.get(name)) for name in schema.names} for row in rows]
    return pa.Table.from_pylist(clean, schema=schema)


def _null_if_nan(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _tensors(reconstructions: Mapping[str, Reconstruction]) -> dict[str, Tensor]:
    """Named tensors of their own: safetensors takes neither strided nor shared memory."""
    tensors = {}
    for key, result in reconstructions.items():
        tensors[f"{key}.inputs"] = _own(result.inputs, torch.float32)
        tensors[f"{key}.labels"] = _own(result.labels, torch.int64)
    return tensors


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _config_bytes(config: ResultConfig) -> bytes:
    return config.model_dump_json(indent=2).encode() + b"\n"

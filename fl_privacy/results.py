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

import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.csv as pa_csv
from safetensors import safe_open
from safetensors.torch import save

from fl_privacy.results_format import (
    COLUMNS,
    Cell,
    MetricInfo,
    ResultConfig,
    ResultError,
    Row,
    chunk_by_key,
    chunks_in,
    config_bytes,
    nodes_of,
    parquet_bytes,
    read_chunk,
    read_config,
    rounds_of,
    same_analysis,
    table_of,
    tensors_of,
)
from fl_privacy.results_store import own, put, remove_unused
from fl_privacy.types import Outcome, Reconstruction

__all__ = [
    "COLUMNS",
    "Cell",
    "MetricInfo",
    "ResultConfig",
    "ResultError",
    "ResultSet",
    "ResultWriter",
    "Row",
    "load_results",
    "nodes_of",
    "read_config",
    "rounds_of",
]


class ResultWriter:
    """The one writer of an analysis, chunk by chunk; made by `open`, let go by `close`."""

    def __init__(self, folder: Path, config: ResultConfig, lock: ExitStack) -> None:
        self._folder = folder
        self._config = config
        self._lock = lock
        self._done = frozenset(chunk_by_key(folder, config))

    @classmethod
    def open(cls, folder: Path, config: ResultConfig, *, wait: bool = False) -> Self:
        """Start an analysis in ``folder``, or go on with the one it holds.

        ``wait`` for another process that is writing it, instead of refusing.

        Raises:
            ResultError: the folder holds another analysis, is being written by another
                process, or cannot be written.
        """
        with ExitStack() as lock:
            lock.callback(os.close, own(folder, wait=wait))
            if (folder / "config.json").exists():
                config = same_analysis(folder, read_config(folder), config)
            put([(folder / "config.json", config_bytes(config))], folder)
            return cls(folder, config, lock.pop_all())

    def close(self) -> None:
        """Let another writer in."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let another writer in; an error, unlike an interruption, leaves no empty analysis."""
        if isinstance(error, Exception) and not self._done:
            remove_unused(self._folder)
        self.close()

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
        last = max((int(path.stem) for path in chunks_in(self._folder)), default=-1)
        stem = self._folder / "chunks" / f"{last + 1:06d}"
        table = table_of(rows, self._config.columns())
        self._put(stem.with_suffix(".safetensors"), save(tensors_of(reconstructions)))
        self._put(stem.with_suffix(".parquet"), parquet_bytes(table))
        self._done |= keys

    def replace(self, rows: Mapping[str, Row]) -> None:
        """Write other rows for targets that have one, by key; each chunk changes as a whole.

        Raises:
            ResultError: the folder cannot be written.
        """
        where = chunk_by_key(self._folder, self._config)
        if rows and self._config.complete:
            self._mark(complete=False)
        for path in sorted({where[key] for key in rows}):
            schema = self._config.columns()
            held = read_chunk(path, schema).to_pylist()
            table = table_of([rows.get(row["key"], row) for row in held], schema)
            self._put(path, parquet_bytes(table))

    def finish(self) -> None:
        """Write ``targets.parquet`` and ``targets.csv`` and mark the analysis complete."""
        table = ResultSet(self._folder).table
        text = io.BytesIO()
        pa_csv.write_csv(table, text)
        self._put(self._folder / "targets.parquet", parquet_bytes(table))
        self._put(self._folder / "targets.csv", text.getvalue())
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
        self._put(self._folder / "config.json", config_bytes(self._config))

    def _put(self, path: Path, data: bytes) -> None:
        put([(path, data)], self._folder)


class ResultSet:
    """Reads one analysis, complete or not; of ``keys`` only, when they are given."""

    def __init__(self, folder: Path, keys: frozenset[str] | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._keys = keys

    @cached_property
    def table(self) -> pa.Table:
        """One row a target, in the order of writing; all that were ever attacked so."""
        schema = self.config.columns()
        return pa.concat_tables(
            [schema.empty_table(), *(read_chunk(path, schema) for path in chunks_in(self.folder))]
        )

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        rows = {row["key"]: row for row in self.table.to_pylist()}
        return {k: row for k, row in rows.items() if self._keys is None or k in self._keys}

    @cached_property
    def _where(self) -> dict[str, Path]:
        return chunk_by_key(self.folder, self.config)

    def rows(self) -> list[dict[str, Any]]:
        """The table as dictionaries, sorted by key."""
        return [self._rows[key] for key in sorted(self._rows)]

    def reconstruction(self, key: str) -> Reconstruction | None:
        """What the adversary made of a target; None when it failed or is not there."""
        if key not in self._rows:
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

"""Reading a recording: entries are streamed, tensors are loaded when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from fl_privacy.protocols import Progress, silent
from fl_privacy.recording_check import check
from fl_privacy.recording_format import (
    FORMAT_VERSION,
    MANIFEST,
    Entry,
    Manifest,
    RecordingError,
    Schema,
    TensorSpec,
    digest,
)
from fl_privacy.recording_index import global_path, header, read_entries, strays
from fl_privacy.recording_refusals import Refusal, read_refusals
from fl_privacy.recording_store import LocalStore, Store, open_store
from fl_privacy.sparse import ARRAY, Part, SparseError, parse, restore
from fl_privacy.types import LazyTensors, Tensors

OPEN_FILES = 2
"""Files that are held open at a time: what was sent, and what was returned to it."""

ENCODED = Schema(tensors=(TensorSpec(name=ARRAY, shape=(), dtype="uint8"),))
"""Where the only array of a sparse update is in its file; its length is its own."""


def read_manifest(store: Store) -> Manifest:
    """The manifest of a recording.

    Raises:
        RecordingError: none there, not readable, or of a newer format.
    """
    where = store.where(MANIFEST)
    if not store.exists(MANIFEST):
        raise RecordingError(f"{where}: not found; {store.where()} is not a recording")
    try:
        fields = json.loads(store.read(MANIFEST))
        version = fields["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise RecordingError(
                f"{where}: format version {version}, this fl-privacy reads up to "
                f"{FORMAT_VERSION}; upgrade fl-privacy"
            )
        return Manifest.model_validate({"id": "", **fields, "created": fields["created"]})
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordingError(f"{where}: not a manifest ({error}); restore the file") from error
    except ValidationError as error:
        raise RecordingError(f"{where}: not a manifest; {error.errors()[0]['msg']}") from error


class Recording:
    """A recording opened for reading.

    Args:
        location: local folder or fsspec URL.

    Raises:
        RecordingError: not a recording, or of a newer format.
    """

    def __init__(self, location: str | Path) -> None:
        self._store = open_store(location)
        self.manifest = read_manifest(self._store)
        self._schemas: dict[str, Schema] = {}
        self._schema_of_global: dict[str, str] = {}
        self._getter = lru_cache(OPEN_FILES)(self._opened)
        self._parts = lru_cache(OPEN_FILES)(self._parsed)

    def entries(
        self,
        *,
        attempt: int | None = None,
        rounds: Collection[int] | None = None,
        nodes: Collection[str] | None = None,
        status: str | None = "ok",
    ) -> Iterator[Entry]:
        """Entries in the order they were written; None takes all.

        ``status="error"`` takes the failures, whatever their reason.
        """
        for entry in read_entries(self._store):
            if (
                (attempt is None or entry.attempt == attempt)
                and (rounds is None or entry.round in rounds)
                and (nodes is None or entry.node in nodes)
                and (status is None or entry.status.partition(":")[0] == status)
            ):
                yield entry

    def schema(self, sha: str) -> Schema:
        """A schema by its digest.

        Raises:
            RecordingError: missing or damaged.
        """
        if sha not in self._schemas:
            path = f"schemas/{sha}.json"
            data = self._intact(path, sha)
            try:
                self._schemas[sha] = Schema.model_validate_json(data)
            except ValidationError as error:
                raise RecordingError(f"{self._store.where(path)}: not a schema") from error
        return self._schemas[sha]

    def sent_schema(self, entry: Entry) -> Schema:
        """The schema of the parameters that were sent."""
        sha = entry.global_digest
        if sha not in self._schema_of_global:
            path = global_path(entry)
            metadata, _ = header(self._store.where(path), self._intact(path, sha))
            self._schema_of_global[sha] = metadata.get("schema", "")
        return self.schema(self._schema_of_global[sha])

    def sent(self, entry: Entry) -> Tensors:
        """The tensors the server sent, as it sent them; checked when first read."""
        path = global_path(entry)
        return self._tensors(path, entry.global_digest, self.sent_schema(entry))

    def returned(self, entry: Entry) -> Tensors:
        """The tensors the client returned, as received; checked when first read.

        A sparse update is decoded: its tensors are those of the reply that it stands for.

        Raises:
            RecordingError: the entry is a failure and has none.
        """
        if not entry.ok:
            raise RecordingError(
                f"{self._store.where()}: node {entry.node} returned nothing in round "
                f"{entry.round} ({entry.status})"
            )
        schema = self.schema(entry.schema_digest)
        if entry.payload == "sparse-update":
            return self._decoded(entry, schema)
        return self._tensors(entry.file, entry.sha256, schema)

    def refusals(self) -> Iterator[Refusal]:
        """Replies that the server kept out of the aggregate, by attempt and round.

        Raises:
            RecordingError: a file of them is damaged.
        """
        return read_refusals(self._store)

    def verify(self, progress: Progress = silent) -> list[str]:
        """Read everything and list what is wrong; each line names the file."""
        return check(self._store, progress)

    def unlisted(self) -> list[str]:
        """Update files that no index line names, as a kill leaves them; resuming lists them."""
        listed = {entry.file for entry in read_entries(self._store)}
        return [self._store.where(path) for path in strays(self._store, listed)]

    def _intact(self, path: str, sha: str) -> bytes:
        data = self._store.read(path)
        if digest(data) != sha:
            raise RecordingError(
                f"{self._store.where(path)}: the content does not match its checksum (truncated "
                f"or changed); restore the file or leave it out"
            )
        return data

    def _tensors(self, path: str, sha: str, schema: Schema) -> LazyTensors:
        positions = schema.positions
        checked = not isinstance(self._store, LocalStore)  # a remote file is, when it is fetched

        def load(name: str) -> Tensor:
            nonlocal checked
            if not checked:
                self._intact(path, sha)
                checked = True
            try:
                return self._getter(path, sha)(f"t{positions[name]}").clone()
            except (OSError, safetensors.SafetensorError) as error:
                raise RecordingError(f"{self._store.where(path)}: {error}") from error

        return LazyTensors(schema.names, load)

    def _decoded(self, entry: Entry, schema: Schema) -> LazyTensors:
        """The tensors of a sparse update, each put together from what was sent and what changed."""
        sent, positions = self.sent(entry), schema.positions

        def load(name: str) -> Tensor:
            try:
                part = self._parts(entry).get(positions[name], {})
                return torch.from_numpy(restore(sent[name].numpy(), part, name))
            except SparseError as error:
                raise RecordingError(f"{self._store.where(entry.file)}: {error}") from error

        return LazyTensors(schema.names, load)

    def _parsed(self, entry: Entry) -> Mapping[int, Part]:
        """What changed in a sparse update, by position."""
        received = self._tensors(entry.file, entry.sha256, ENCODED)[ARRAY]
        sizes = [math.prod(spec.shape) for spec in self.schema(entry.schema_digest).tensors]
        return parse(received.numpy().tobytes(), sizes)

    def _opened(self, path: str, sha: str) -> Callable[[str], Tensor]:
        """Reads the tensors of a file by key. A local file is mapped, a remote one fetched."""
        if isinstance(self._store, LocalStore):
            get: Callable[[str], Tensor] = safetensors.safe_open(
                self._store.where(path), framework="pt"
            ).get_tensor
            return get
        return safetensors.torch.load(self._intact(path, sha)).__getitem__

"""Reading a recording: entries are streamed, tensors are loaded when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fl_privacy.protocols import Progress, silent
from fl_privacy.recording_format import (
    FORMAT_VERSION,
    LINES_PER_SEGMENT,
    MANIFEST,
    Entry,
    Manifest,
    RecordingError,
    Schema,
    digest,
)
from fl_privacy.recording_store import LocalStore, Store, open_store
from fl_privacy.types import LazyTensors, Tensors

_ENTRIES = TypeAdapter(list[Entry])


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
        return Manifest.model_validate({"id": "", **fields})
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordingError(f"{where}: not a manifest ({error}); restore the file") from error
    except ValidationError as error:
        raise RecordingError(f"{where}: not a manifest; {error.errors()[0]['msg']}") from error


def read_segment(store: Store, name: str, *, last: bool) -> list[Entry]:
    """The entries of one index segment; the unterminated last line of the last is ignored.

    Raises:
        RecordingError: a line that is no entry; names the file and the line.
    """
    lines = store.read(f"index/{name}").split(b"\n")
    tail = lines.pop()
    where = store.where(f"index/{name}")
    if tail and not last:
        raise RecordingError(f"{where}: line {len(lines) + 1} is cut off; restore the file")
    try:
        return _ENTRIES.validate_json(b"[" + b",".join(lines) + b"]")
    except ValidationError:
        for number, line in enumerate(lines, start=1):
            try:
                Entry.model_validate_json(line)
            except ValidationError as error:
                raise RecordingError(
                    f"{where}: line {number} is damaged ({error.errors()[0]['msg']}); "
                    f"restore the file"
                ) from error
        raise RecordingError(f"{where}: damaged; restore the file") from None


def read_entries(store: Store) -> Iterator[Entry]:
    """All entries in the order they were written."""
    names = store.names("index")
    for name in names:
        yield from read_segment(store, name, last=name == names[-1])


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
        self._fetched: tuple[str, Tensors] = ("", {})

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
            path = _global_path(entry)
            metadata, _ = _header(self._store.where(path), self._intact(path, sha))
            self._schema_of_global[sha] = metadata["schema"]
        return self.schema(self._schema_of_global[sha])

    def sent(self, entry: Entry) -> Tensors:
        """The tensors the server sent, as it sent them; checked when first read."""
        path = _global_path(entry)
        return self._tensors(path, entry.global_digest, self.sent_schema(entry))

    def returned(self, entry: Entry) -> Tensors:
        """The tensors the client returned, as received; checked when first read.

        Raises:
            RecordingError: the entry is a failure and has none.
        """
        if not entry.ok:
            raise RecordingError(
                f"{self._store.where()}: node {entry.node} returned nothing in round "
                f"{entry.round} ({entry.status})"
            )
        return self._tensors(entry.file, entry.sha256, self.schema(entry.schema_digest))

    def verify(self, progress: Progress = silent) -> list[str]:
        """Read everything and list what is wrong; each line names the file."""
        problems: list[str] = []
        checked: set[str] = set()
        names = self._store.names("index")
        for number, name in enumerate(names, start=1):
            try:
                entries = read_segment(self._store, name, last=number == len(names))
            except RecordingError as error:
                problems.append(str(error))
                continue
            done = (number - 1) * LINES_PER_SEGMENT
            total = done + len(entries) if number == len(names) else len(names) * LINES_PER_SEGMENT
            for i, entry in enumerate(entries, start=1):
                problems += self._problems(entry, checked)
                progress(done + i, total)
        return problems

    def _problems(self, entry: Entry, checked: set[str]) -> Iterator[str]:
        shared = [(_global_path(entry), entry.global_digest)] if entry.global_digest else []
        if entry.file:
            shared.append((f"schemas/{entry.schema_digest}.json", entry.schema_digest))
        for path, sha in shared:
            if path not in checked:
                checked.add(path)
                yield from self._problem(path, sha)
        if entry.file:
            yield from self._problem(entry.file, entry.sha256, entry)

    def _problem(self, path: str, sha: str, entry: Entry | None = None) -> Iterator[str]:
        where = self._store.where(path)
        try:
            data = self._store.read(path)
            if entry and len(data) != entry.bytes:
                yield f"{where}: {len(data)} bytes, expected {entry.bytes}"
            elif digest(data) != sha:
                yield f"{where}: the content does not match its checksum"
            elif entry and own_entry(where, data) != entry:
                yield f"{where}: its index line was changed"
        except RecordingError as error:
            yield str(error)

    def _intact(self, path: str, sha: str) -> bytes:
        data = self._store.read(path)
        if digest(data) != sha:
            raise RecordingError(
                f"{self._store.where(path)}: the content does not match its checksum (truncated "
                f"or changed); restore the file or leave it out"
            )
        return data

    def _tensors(self, path: str, sha: str, schema: Schema) -> LazyTensors:
        keys = {name: f"t{i}" for i, name in enumerate(schema.names)}
        checked = False

        def load(name: str) -> Tensor:
            nonlocal checked
            if not isinstance(self._store, LocalStore):
                return self._fetch(path, sha)[keys[name]]
            if not checked:
                self._intact(path, sha)
                checked = True
            try:
                with safetensors.safe_open(self._store.where(path), framework="pt") as file:
                    tensor: Tensor = file.get_tensor(keys[name])
                    return tensor
            except (OSError, safetensors.SafetensorError) as error:
                raise RecordingError(f"{self._store.where(path)}: {error}") from error

        return LazyTensors(schema.names, load)

    def _fetch(self, path: str, sha: str) -> Tensors:
        """The tensors of a remote file; the last one is kept, it is read name by name."""
        if self._fetched[0] != path:
            data = self._intact(path, sha)
            self._fetched = (path, safetensors.torch.load(data))
        return self._fetched[1]


def own_entry(where: str, data: bytes) -> Entry:
    """The index line of an update, rebuilt from the update file itself.

    Raises:
        RecordingError: not a whole update file.
    """
    metadata, end = _header(where, data)
    if end != len(data):
        raise RecordingError(f"{where}: {len(data)} bytes, expected {end}")
    try:
        entry = Entry.model_validate_json(metadata.get("entry", ""))
    except ValidationError as error:
        raise RecordingError(f"{where}: holds no index line of its own") from error
    return entry.model_copy(update={"bytes": len(data), "sha256": digest(data)})


def _header(where: str, data: bytes) -> tuple[dict[str, str], int]:
    """Metadata of a safetensors file and where its last tensor ends."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata: dict[str, str] = header.pop("__metadata__", {})
        ends = [int(tensor["data_offsets"][1]) for tensor in header.values()]
        return metadata, start + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"{where}: not a whole safetensors file ({error})") from error


def _global_path(entry: Entry) -> str:
    return f"globals/{entry.global_digest}.safetensors"

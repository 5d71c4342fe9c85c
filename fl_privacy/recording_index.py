"""The index of a recording: segments of lines, and the line that each update carries itself."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator

from pydantic import TypeAdapter, ValidationError

from fl_privacy.recording_format import (
    LINES_PER_SEGMENT,
    UPDATE_FILE,
    Entry,
    RecordingError,
    digest,
)
from fl_privacy.recording_store import Store

_ENTRIES = TypeAdapter(list[Entry])
_SEGMENT = re.compile(r"[0-9]{6}\.jsonl")
_UPDATE = re.compile(UPDATE_FILE)


def segment_name(number: int) -> str:
    """The file of segment ``number``, counted from 0."""
    return f"{number:06d}.jsonl"


def segments(store: Store) -> list[str]:
    """The segments there must be: from the first to the last that is there."""
    names = [name for name in store.names("index") if _SEGMENT.fullmatch(name)]
    return [segment_name(i) for i in range(int(names[-1][:6]) + 1)] if names else []


def read_segment(store: Store, name: str, *, last: bool) -> list[Entry]:
    """The entries of one index segment; the unterminated last line of the last is ignored.

    Raises:
        RecordingError: missing, short though it is not the last, or a line that is no entry;
            names the file and the line.
    """
    lines = store.read(f"index/{name}").split(b"\n")
    tail = lines.pop()
    where = store.where(f"index/{name}")
    if tail and not last:
        raise RecordingError(f"{where}: line {len(lines) + 1} is cut off; restore the file")
    if len(lines) != LINES_PER_SEGMENT and not last:
        raise RecordingError(
            f"{where}: {len(lines)} lines, expected {LINES_PER_SEGMENT}; restore the file"
        )
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
    names = segments(store)
    for name in names:
        yield from read_segment(store, name, last=name == names[-1])


def attempts(store: Store) -> list[int]:
    """The attempts that have updates, in order."""
    return sorted(int(name) for name in store.names("updates") if name.isdecimal())


def files_of(store: Store, attempt: int) -> list[str]:
    """Everything in the folders of an attempt's rounds."""
    root = f"updates/{attempt}"
    rounds = store.names(root)
    return [f"{root}/{round}/{name}" for round in rounds for name in store.names(f"{root}/{round}")]


def strays(store: Store, listed: Collection[str]) -> list[str]:
    """The update files not in ``listed``, by attempt and in the order of arrival."""
    found = [path for attempt in attempts(store) for path in files_of(store, attempt)]
    updates = [path for path in found if path not in listed and _UPDATE.fullmatch(path)]
    return sorted(updates, key=numbers_of)


def numbers_of(path: str) -> tuple[int, int, int]:
    """Attempt, n and round of an update file: ``n`` counts over the rounds of an attempt."""
    _, attempt, round, name = path.split("/")
    return int(attempt), int(name.partition(".")[0]), int(round)


def own_entry(where: str, data: bytes) -> Entry:
    """The index line of an update, rebuilt from the update file itself.

    Raises:
        RecordingError: not a whole update file.
    """
    metadata, end = header(where, data)
    if end != len(data):
        raise RecordingError(f"{where}: {len(data)} bytes, expected {end}")
    try:
        entry = Entry.model_validate_json(metadata.get("entry", ""))
    except ValidationError as error:
        raise RecordingError(f"{where}: holds no index line of its own") from error
    return entry.model_copy(update={"bytes": len(data), "sha256": digest(data)})


def header(where: str, data: bytes) -> tuple[dict[str, str], int]:
    """Metadata of a safetensors file and where its last tensor ends."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata: dict[str, str] = header.pop("__metadata__", {})
        ends = [int(tensor["data_offsets"][1]) for tensor in header.values()]
        return metadata, start + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"{where}: not a whole safetensors file ({error})") from error


def global_path(entry: Entry) -> str:
    """Where the parameters lie that the client was sent."""
    return f"globals/{entry.global_digest}.safetensors"

"""Is a recording whole? Every file against its checksum, every line against its neighbors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from fl_privacy.protocols import Progress
from fl_privacy.recording_format import LINES_PER_SEGMENT, Entry, RecordingError, digest
from fl_privacy.recording_index import (
    global_path,
    numbers_of,
    own_entry,
    read_segment,
    segment_name,
    segments,
    strays,
)
from fl_privacy.recording_refusals import read_refusals
from fl_privacy.recording_store import Store


def check(store: Store, progress: Progress) -> list[str]:
    """Read everything and list what is wrong; each line names the file."""
    problems: list[str] = []
    checked: set[str] = set()
    listed: set[str] = set()
    expected: dict[int, int] = {}
    names = segments(store)
    total = 0
    for number, name in enumerate(names, start=1):
        try:
            entries = read_segment(store, name, last=number == len(names))
        except RecordingError as error:
            problems.append(str(error))
            continue
        done = (number - 1) * LINES_PER_SEGMENT
        total = done + len(entries) if number == len(names) else len(names) * LINES_PER_SEGMENT
        for i, entry in enumerate(entries, start=1):
            problems += _of_entry(store, entry, checked)
            progress(done + i, total)
        problems += _gaps(store.where(f"index/{name}"), entries, expected)
        listed.update(entry.file for entry in entries)
    try:
        list(read_refusals(store))
    except RecordingError as error:
        problems.append(str(error))
    end = store.where(f"index/{segment_name(total // LINES_PER_SEGMENT)}")
    return problems or list(_missing_lines(end, strays(store, listed)))


def _gaps(where: str, entries: Iterable[Entry], expected: dict[int, int]) -> Iterator[str]:
    """Lines that do not follow the one before; ``expected`` is the next ``n`` by attempt."""
    for line, entry in enumerate(entries, start=1):
        n = expected.get(entry.attempt, 0)
        if entry.n != n:
            yield (
                f"{where}: line {line} is number {entry.n} of attempt {entry.attempt}, "
                f"expected {n}; restore the file"
            )
        expected[entry.attempt] = entry.n + 1


def _missing_lines(where: str, unlisted: Iterable[str]) -> Iterator[str]:
    """Unlisted updates of several rounds: a kill leaves those of one round at most."""
    rounds: defaultdict[int, set[int]] = defaultdict(set)
    for path in unlisted:
        attempt, _, round = numbers_of(path)
        rounds[attempt].add(round)
    for attempt, missing in rounds.items():
        if len(missing) > 1:
            yield (
                f"{where}: lines are missing, updates of {len(missing)} rounds of attempt "
                f"{attempt} are not listed; restore the file"
            )


def _of_entry(store: Store, entry: Entry, checked: set[str]) -> Iterator[str]:
    shared = [(global_path(entry), entry.global_digest)] if entry.global_digest else []
    if entry.file:
        shared.append((f"schemas/{entry.schema_digest}.json", entry.schema_digest))
    for path, sha in shared:
        if path not in checked:
            checked.add(path)
            yield from _of_file(store, path, sha)
    if entry.file:
        yield from _of_file(store, entry.file, entry.sha256, entry)


def _of_file(store: Store, path: str, sha: str, entry: Entry | None = None) -> Iterator[str]:
    where = store.where(path)
    try:
        data = store.read(path)
        if entry and len(data) != entry.bytes:
            yield f"{where}: {len(data)} bytes, expected {entry.bytes}"
        elif digest(data) != sha:
            yield f"{where}: the content does not match its checksum"
        elif entry and own_entry(where, data) != entry:
            yield f"{where}: its index line was changed"
    except RecordingError as error:
        yield str(error)

"""Before the first line is written: a recording is created, or checked and cleared to resume."""

from __future__ import annotations

from collections.abc import Iterable

from fl_privacy.recording_format import MANIFEST, Manifest, RecordingError
from fl_privacy.recording_index import attempts, files_of, read_entries, segments
from fl_privacy.recording_reader import read_manifest
from fl_privacy.recording_store import TEMPORARY, Store

_FOLDERS = ("index", "schemas", "globals", "refused")
_FIXED = ("model", "dataset", "task", "local_training")
_FREE = ("num-server-rounds", "resume", "record-")
"""Beginnings of the run settings that decide what is recorded, not the numbers in it."""


def is_unused(store: Store) -> bool:
    """Whether a recording holds nothing but its manifest: the run failed before any reply."""
    return not store.names("index") and not store.names("updates")


def create(store: Store, manifest: Manifest) -> None:
    """Write the manifest of a new recording, or of one in the place of an unused one.

    Raises:
        RecordingError: the folder holds a recording with replies, or something else.
    """
    if store.exists(MANIFEST):
        if not is_unused(store):
            raise RecordingError(
                f"{store.where()}: already holds a recording; choose a new folder or resume"
            )
    elif strangers := [name for name in store.names("") if not name.endswith(TEMPORARY)]:
        raise RecordingError(
            f"{store.where()}: exists and is not a recording (it holds "
            f"{', '.join(strangers[:3])}); choose a new or empty folder"
        )
    store.put([(MANIFEST, manifest.model_dump_json(indent=2).encode())])


def check_same(store: Store, manifest: Manifest) -> None:
    """Refuse to resume what was recorded of another model, data set, training or run config.

    Only settings that both manifests hold are compared: versions add and remove some.

    Raises:
        RecordingError: naming the first difference.
    """
    first = read_manifest(store)
    pairs = {name: (getattr(first, name), getattr(manifest, name)) for name in _FIXED}
    for key, now in manifest.run_config.items():
        if not key.startswith(_FREE):
            pairs.setdefault(key, (first.run_config.get(key, now), now))
    for name, (before, now) in pairs.items():
        if before != now:
            raise RecordingError(
                f"{store.where(MANIFEST)}: holds {name} {before}, the run to resume has {now}; "
                f"repeat what it holds, or record in a new folder"
            )


def recover(store: Store, known: Iterable[int] = ()) -> tuple[int, int, int]:
    """Clear what a kill left; the new attempt, the open segment and its number of lines.

    ``known``: attempts of which the recording may hold nothing.
    """
    numbers = attempts(store)
    left = [f"{folder}/{name}" for folder in _FOLDERS for name in store.names(folder)]
    for path in left + [path for last in numbers[-1:] for path in files_of(store, last)]:
        if path.endswith(TEMPORARY):
            store.remove(path)
    names = segments(store)
    earlier = {*numbers, *known}
    if not names:
        return max(earlier, default=0) + 1, 0, 0
    path = f"index/{names[-1]}"
    data = store.read(path)
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        store.put([(path, whole)])
    earlier.update(entry.attempt for entry in read_entries(store))
    return max(earlier, default=0) + 1, len(names) - 1, whole.count(b"\n")

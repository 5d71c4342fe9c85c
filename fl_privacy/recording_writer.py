"""Writing a recording so that a kill at any moment never loses a listed update."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from logging import getLogger
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from fl_privacy.printable import plain
from fl_privacy.recording_format import (
    LINES_PER_SEGMENT,
    LOST,
    MANIFEST,
    MISSED,
    NO_LAYOUT,
    NOTHING,
    Arrays,
    Entry,
    Layout,
    Manifest,
    Payload,
    RecordingError,
    Reply,
    Schema,
    digest,
    encode,
    line_of,
)
from fl_privacy.recording_index import (
    numbers_of,
    own_entry,
    read_entries,
    segment_name,
    strays,
)
from fl_privacy.recording_opening import check_same, create, recover
from fl_privacy.recording_refusals import Refusal, file_of
from fl_privacy.recording_store import (
    Budgeted,
    BudgetError,
    LocalStore,
    Store,
    open_store,
)

WAITING_BYTES = 64 * 2**20


class RecordingWriter:
    """The one writer of a recording; made by `RecordingWriter.open`.

    Memory does not grow with the number of rounds, but with those whose lines a full disk keeps
    from being written. Safe to call from several threads.

    A ``patient`` one goes on where there is no room, or none is left in its budget: replies that
    it could not store are listed as failures, `MISSED` and the reason, as soon as lines can be
    written.
    """

    def __init__(self, store: Store, attempt: int, segment: int, lines: int) -> None:
        self.attempt = attempt
        self._store = store
        self._patient = False
        self._complaint = ""
        self._told = set[object]()
        self._unlisted: list[Entry] = []
        self._refused: list[tuple[str, bytes]] = []
        self._unsent: set[str] = set()
        self._segment = segment
        self._lines = lines
        self._n = 0
        self._waiting: dict[str, bytes] = {}
        self._schema: tuple[object, str] = (None, "")
        self._lock = Lock()
        self._broken = ""
        self._owned = ExitStack()

    @classmethod
    def open(
        cls,
        location: str | Path,
        manifest: Manifest,
        *,
        resume: bool = False,
        patient: bool = False,
        budget: int = 0,
        completed: Collection[tuple[int, int]] = (),
    ) -> RecordingWriter:
        """Create a recording, or resume one as a new attempt (which keeps its manifest).

        Args:
            location: absolute local folder or fsspec URL; new, empty, or with a recording that
                never got a reply.
            manifest: what is recorded.
            resume: continue an existing recording of the same model, data and training.
            patient: go on without what cannot be stored.
            budget: bytes that the recording may take in all; 0 for any number.
            completed: attempt and round of what the run itself kept, if it resumes; rounds of
                the last attempt that were not listed (a full disk, then a kill) are, as
                `NOTHING`.

        Raises:
            RecordingError: relative or unwritable folder, a folder of something else, an
                existing recording without ``resume``, one that differs or is being written.
        """
        store = open_store(location)
        if isinstance(store, LocalStore) and not store.root.is_absolute():
            raise RecordingError(f"{location}: expected an absolute folder, got a relative one")
        with ExitStack() as owned:
            if isinstance(store, LocalStore):
                owned.callback(os.close, store.lock())
            if resume and store.exists(MANIFEST):
                check_same(store, manifest)
            else:
                create(store, manifest)
            place = recover(store, (attempt for attempt, _ in completed))
            bounded = Budgeted(store, budget) if budget else store
            writer = cls(bounded, *place)
            writer._adopt(completed)  # without patience: its lines come before all others
            writer._patient = patient
            writer._owned = owned.pop_all()
        return writer

    def put_global(self, arrays: Arrays, layout: Layout = NO_LAYOUT) -> tuple[str, str]:
        """Store parameters as sent, once per content.

        They go to disk together with the first replies to them, and never after.

        Returns:
            The digests of the schema and of the stored file; of a patient writer also where
            they could not be stored, and then replies to them are not stored either.
        """
        with self._writing():
            described = Schema.of(arrays, layout).model_dump_json().encode()
            schema = digest(described)
            data = encode(arrays, {"schema": schema})
            sha = digest(data)
            path = f"globals/{sha}.safetensors"
            try:
                self._put_schema(arrays, layout)
                if path not in self._waiting and not self._store.exists(path):
                    self._waiting[path] = data
                self._unsent.discard(sha)
            except RecordingError as error:
                self._go_on_without(error)
                self._unsent.add(sha)
            if sum(map(len, self._waiting.values())) > WAITING_BYTES:
                self._put_waiting()
            return schema, sha

    def append(
        self,
        *,
        round: int,
        node: str,
        arrays: Arrays | None,
        num_examples: int | None,
        global_digest: str,
        layout: Layout = NO_LAYOUT,
        status: str = "ok",
        payload: Payload = "weights",
        schema_digest: str = "",
    ) -> Entry:
        """Store and list one reply; see `extend` and `Reply`."""
        reply = Reply(
            round,
            node,
            arrays,
            num_examples,
            global_digest,
            layout,
            status,
            payload,
            schema_digest,
        )
        (entry,) = self.extend([reply])
        return entry

    def holds(self, sent: str) -> bool:
        """Whether what has this digest, of `put_global`, is stored or will be."""
        return sent not in self._unsent

    def extend(self, replies: Iterable[Reply]) -> list[Entry]:
        """Store replies and list them.

        When this returns they are complete on disk and listed (an object store lists them
        when the round ends). A group costs little more than one reply; each reply is asked
        for when the one before is written.

        Raises:
            RecordingError: no room, not writable, or a reply that cannot be stored; none of
                the group is listed then. If the index itself could not be written, every
                later call is refused, and resuming lists what was stored.
        """
        with self._writing():
            self._list([])
            entries: list[Entry] = []
            asked: list[Reply] = []
            coming = self._asked(replies, asked)
            first = self._n + len(self._unlisted)
            try:
                if self._unlisted:  # what is stored now could not be listed either
                    raise RecordingError(self._complaint)
                self._put(self._files(coming, entries, first))
                self._tell_recovery(entries)
            except RecordingError as error:
                self._go_on_without(error)
                deque(coming, maxlen=0)
                self._put_waiting()
                entries = self._one_by_one(asked, first)
            self._list(entries)
            return entries

    def end_round(self, round: int) -> None:
        """Make the round's index lines visible on an object store."""
        with self._writing():
            self._finish()

    def put_refusals(self, refusals: Iterable[Refusal]) -> None:
        """Store which replies of a round were kept out of the aggregate; nothing, if none was."""
        if refused := list(refusals):
            with self._writing():
                self._refused.append(file_of(refused))
                self._put_refused()

    def close(self) -> None:
        """Flush and let another writer in."""
        with self._lock, self._owned:
            if not self._broken:
                self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            if self._broken:
                raise RecordingError(
                    f"{self._broken}; nothing more is recorded, resume the run to go on"
                )
            yield

    def _put_refused(self) -> None:
        """Store the files of refusals that could not be stored before."""
        try:
            self._store.put(self._refused)
            self._refused = []
        except RecordingError as error:
            self._go_on_without(error)

    def _finish(self) -> None:
        """Write what waits, and the lines that could not be written before."""
        try:
            self._put_waiting()
            self._put_refused()
            self._list([])
            self._store.flush()
        except RecordingError as error:
            self._go_on_without(error)

    def _go_on_without(self, error: RecordingError) -> None:
        """Say what was not stored; an impatient writer raises."""
        if not (self._patient or isinstance(error, BudgetError)):
            raise error
        cause = error.__cause__.errno if isinstance(error.__cause__, OSError) else str(error)
        if cause not in self._told and str(error) != self._complaint:
            getLogger("flwr").warning("training goes on unrecorded: %s", plain(str(error)))
        self._told.add(cause)
        self._complaint = str(error)

    def _tell_recovery(self, entries: Sequence[Entry]) -> None:
        if self._complaint and any(entry.ok for entry in entries):
            getLogger("flwr").warning("recording goes on")
            self._complaint = ""
            self._told.clear()

    def _put_waiting(self) -> None:
        """Store what was sent; replies to what could not be stored are not stored either."""
        try:
            self._put([])
        except RecordingError as error:
            self._go_on_without(error)
            self._unsent |= {Path(path).stem for path in self._waiting}
            self._waiting = {}

    def _asked(self, replies: Iterable[Reply], seen: list[Reply]) -> Iterator[Reply]:
        """Replies, noted; to what could not be stored they pass without arrays."""
        for reply in replies:
            if reply.global_digest in self._unsent:
                reply = _missed(reply, self._complaint)
            seen.append(reply)
            yield reply

    def _one_by_one(self, replies: Sequence[Reply], first: int) -> list[Entry]:
        """Store what can be stored of a group that does not fit as a whole."""
        entries: list[Entry] = []
        for n, reply in enumerate(replies, start=first):
            try:
                if self._unlisted:
                    raise RecordingError(self._complaint)
                if reply.global_digest in self._unsent:
                    reply = _missed(reply, self._complaint)
                self._put(self._files([reply], entries, n))
            except RecordingError as error:
                self._go_on_without(error)
                entries[n - first :] = [self._entry(n, _missed(reply, str(error)))]
        return entries

    def _put_schema(self, arrays: Arrays, layout: Layout) -> str:
        """Nearly every reply has the schema of the one before."""
        key = (layout, [(name, array.shape, array.dtype.name) for name, array in arrays.items()])
        if key != self._schema[0]:
            data = Schema.of(arrays, layout).model_dump_json().encode()
            sha = digest(data)
            if not self._store.exists(f"schemas/{sha}.json"):
                self._store.put([(f"schemas/{sha}.json", data)])
            self._schema = (key, sha)
        return self._schema[1]

    def _put(self, files: Iterable[tuple[str, bytes]]) -> None:
        self._store.put(chain(self._waiting.items(), files))
        self._waiting = {}

    def _files(
        self, replies: Iterable[Reply], entries: list[Entry], first: int
    ) -> Iterator[tuple[str, bytes]]:
        """The update file of each reply that has one; fills in ``entries`` on the way.

        ``first``: the number of the first reply.
        """
        for n, reply in enumerate(replies, start=first):
            entry = self._entry(n, reply)
            line_of(entry)  # refuses what cannot be listed before it is stored
            if reply.arrays is not None:
                schema = reply.schema_digest or self._put_schema(reply.arrays, reply.layout)
                entry, data = self._update(entry, reply.arrays, schema)
                yield entry.file, data
            entries.append(entry)

    def _entry(self, n: int, reply: Reply) -> Entry:
        return Entry(
            attempt=self.attempt,
            round=reply.round,
            node=reply.node,
            n=n,
            global_digest=reply.global_digest,
            num_examples=reply.num_examples,
            status=reply.status,
            payload=reply.payload,
        )

    def _update(self, entry: Entry, arrays: Arrays, schema: str) -> tuple[Entry, bytes]:
        path = f"updates/{entry.attempt}/{entry.round}/{entry.n}.safetensors"
        entry = entry.model_copy(update={"file": path, "schema_digest": schema})
        own = entry.model_dump_json(by_alias=True, exclude={"bytes", "sha256"})
        data = encode(arrays, {"entry": own})
        return entry.model_copy(update={"bytes": len(data), "sha256": digest(data)}), data

    def _list(self, entries: Sequence[Entry]) -> None:
        """Write the lines of entries, after those that could not be written before."""
        entries, self._unlisted = [*self._unlisted, *entries], []
        while entries:
            if self._lines == LINES_PER_SEGMENT:
                self._segment, self._lines = self._segment + 1, 0
            fitting = entries[: LINES_PER_SEGMENT - self._lines]
            path = f"index/{segment_name(self._segment)}"
            try:
                self._store.append(path, b"".join(line_of(entry) for entry in fitting))
            except RecordingError as error:
                if not self._patient:
                    self._broken = str(error)
                    raise
                self._unlisted = list(entries)
                self._go_on_without(error)
                return
            self._lines += len(fitting)
            self._n = fitting[-1].n + 1
            entries = entries[len(fitting) :]

    def _adopt(self, completed: Collection[tuple[int, int]]) -> None:
        """List the intact updates that the last attempt stored but could not list.

        Failures have no file of their own: a number that is missing between was one, and of a
        ``completed`` round nothing may be left.
        """
        last = self.attempt - 1
        listed = [entry for entry in read_entries(self._store) if entry.attempt == last]
        self._n = listed[-1].n + 1 if listed else 0
        seen = {entry.round for entry in listed}
        for path in strays(self._store, {entry.file for entry in listed}):
            attempt, n, round = numbers_of(path)
            if attempt != last or n < self._n:
                continue
            try:
                entry = own_entry(self._store.where(path), self._store.read(path))
            except RecordingError:
                continue  # cut short by the kill: it was never listed
            lost = [
                Entry(attempt=last, round=round, node="", n=i, status=LOST)
                for i in range(self._n, n)
            ]
            self._list([*lost, entry])
            seen.add(round)
        unseen = sorted({round for attempt, round in completed if attempt == last} - seen)
        self._list(
            [
                Entry(attempt=last, round=round, node="", n=n, status=NOTHING)
                for n, round in enumerate(unseen, start=self._n)
            ]
        )
        self._store.flush()
        self._n = 0


def _missed(reply: Reply, reason: str) -> Reply:
    """A reply of which nothing but this is kept."""
    status = f"{MISSED}: {reason}" if reply.status == "ok" else reply.status
    return replace(reply, arrays=None, global_digest="", status=status)

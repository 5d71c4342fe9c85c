"""A patient recording: training goes on where there is no room, and what is missing is marked."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fl_privacy import recording_store
from fl_privacy.inspection import recorded
from fl_privacy.recording import Entry, Recording, RecordingError, RecordingWriter, Reply
from fl_privacy.recording_format import MISSED, NO_LAYOUT, NOTHING, Arrays
from fl_privacy.recording_refusals import Refusal
from strategies.recorder import Recorder
from tests.fl_privacy.test_recording import MANIFEST, WEIGHTS

CLIENTS = 3


def write_round(writer: RecordingWriter, round: int) -> list[Entry]:
    """One round as the strategy writes it: a new global model, a group of replies, its end."""
    _, sent = writer.put_global({name: a + np.float32(round) for name, a in WEIGHTS.items()})
    replies = (
        Reply(round, str(node), {n: a + np.float32(node) for n, a in WEIGHTS.items()}, 5, sent)
        for node in range(CLIENTS)
    )
    entries = writer.extend(replies)
    writer.end_round(round)
    return entries


class Disk:
    """A disk that is full for files in some folders, after a number of their bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full: tuple[str, ...] = ()
        self.left = 0
        self._write = recording_store._write
        monkeypatch.setattr(recording_store, "_write", self.write)

    def write(self, path: Path, data: bytes, flags: int) -> None:
        if not any(f"/{folder}/" in str(path) for folder in self.full):
            self._write(path, data, flags)
            return
        self._write(path, data[: self.left], flags)
        if len(data) > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.left -= len(data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def statuses(root: Path) -> list[tuple[int, str, bool]]:
    return [(e.round, e.node, e.ok) for e in Recording(root).entries(status=None)]


def each(rounds: Iterable[int], missing: Iterable[int] = ()) -> list[tuple[int, str, bool]]:
    gone = set(missing)
    return [(r, str(node), r not in gone) for r in rounds for node in range(CLIENTS)]


def files(root: Path) -> Iterator[str]:
    return (str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize("left", [0, 150, 1_000])
@pytest.mark.parametrize(
    "full",
    [("updates",), ("globals",), ("index",), ("updates", "globals", "schemas", "index")],
    ids=lambda full: "+".join(full),
)
def test_a_disk_that_is_full_for_two_rounds(
    full: tuple[str, ...], left: int, tmp_path: Path, disk: Disk
) -> None:
    root = tmp_path / "r"
    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        write_round(writer, 1)
        disk.full, disk.left = full, left
        for round in (2, 3):
            write_round(writer, round)
            assert Recording(root).verify() == [], "readable at any moment"
        disk.full = ()
        write_round(writer, 4)
    listed = statuses(root)
    assert [line[:2] for line in listed] == [line[:2] for line in each(range(1, 5))]
    whole = {line[0] for line in listed if line[2]}
    assert {1, 4} <= whole
    if full == ("index",):
        assert whole == {1, 2, 4}, "round 2 was stored before its lines could not be written"
    elif not left:
        assert whole == {1, 4}
    recording = Recording(root)
    assert recording.verify() == []
    for entry in recording.entries():
        name, *_ = recording.returned(entry)
        expected = WEIGHTS[name] + np.float32(int(entry.node))
        assert np.array_equal(recording.returned(entry)[name].numpy(), expected)
    reasons = {e.status for e in recording.entries(status="error")}
    assert all(reason.startswith(MISSED) for reason in reasons)
    assert not [name for name in files(root) if name.endswith(".tmp")]


def test_a_disk_that_stays_full_leaves_what_is_there_and_resuming_goes_on(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "r"
    everything = ("updates", "globals", "schemas", "index", "refused")
    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        write_round(writer, 1)
        disk.full = everything
        for round in (2, 3, 4):
            write_round(writer, round)
            refusal = Refusal(attempt=1, round=round, n=0, node="1", reason="no")
            writer.put_refusals([refusal])
    assert statuses(root) == each([1])
    assert Recording(root).verify() == []
    assert sum("training goes on unrecorded" in r.getMessage() for r in caplog.records) == 1
    disk.full = ()
    with RecordingWriter.open(root, MANIFEST, resume=True) as writer:
        write_round(writer, 1)
    assert len(statuses(root)) == 2 * CLIENTS
    assert Recording(root).verify() == []


@pytest.mark.parametrize("recorded_before", [1, 0])
def test_completed_rounds_whose_lines_a_kill_took_are_listed_when_the_run_resumes(
    recorded_before: int, tmp_path: Path, disk: Disk
) -> None:
    """The disk is full, the process is killed: no line of these rounds is anywhere."""
    root = tmp_path / "r"
    killed = RecordingWriter.open(root, MANIFEST, patient=True)
    for round in range(1, recorded_before + 1):
        write_round(killed, round)
    disk.full = ("updates", "globals", "schemas", "index")
    for round in range(recorded_before + 1, 4):
        write_round(killed, round)
    killed._owned.close()  # the lock alone: nothing more is written
    disk.full = ()
    history = [(1, 1), (1, 2), (1, 3)]
    for completed in (history, [*history, (2, 1)]):
        with RecordingWriter.open(root, MANIFEST, resume=True, completed=completed) as writer:
            attempt = writer.attempt
            write_round(writer, 1)
    assert attempt == 3
    lines = [(e.attempt, e.round, e.n, e.status) for e in Recording(root).entries(status=None)]
    rounds = range(1, recorded_before + 1)
    listed = [(1, r, CLIENTS * (r - 1) + i, "ok") for r in rounds for i in range(CLIENTS)]
    gone = range(recorded_before + 1, 4)
    nothing = [(1, r, len(listed) + i, NOTHING) for i, r in enumerate(gone)]
    later = [(attempt, 1, i, "ok") for attempt in (2, 3) for i in range(CLIENTS)]
    assert lines == [*listed, *nothing, *later]
    assert Recording(root).verify() == []


def test_replies_of_one_round_that_come_one_by_one_need_what_was_sent(
    tmp_path: Path, disk: Disk
) -> None:
    """As in an app recorded at the Grid: the model sent is lost, room comes back in mid-round."""
    root = tmp_path / "r"
    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        _, sent = writer.put_global(WEIGHTS)
        disk.full = ("globals",)
        first = writer.append(round=1, node="0", arrays=WEIGHTS, num_examples=1, global_digest=sent)
        disk.full = ()
        second = writer.append(
            round=1, node="1", arrays=WEIGHTS, num_examples=1, global_digest=sent
        )
        _, again = writer.put_global(WEIGHTS)
        third = writer.append(
            round=2, node="1", arrays=WEIGHTS, num_examples=1, global_digest=again
        )
    assert not first.ok
    assert not second.ok
    assert second.status == first.status
    assert third.ok
    assert Recording(root).verify() == []
    assert [e.n for e in Recording(root).entries(status=None)] == [0, 1, 2]


@pytest.mark.parametrize("patient", [True, False])
def test_a_budget_stops_the_recording_and_not_training(
    patient: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, budget = tmp_path / "r", 9_000
    with RecordingWriter.open(root, MANIFEST, patient=patient, budget=budget) as writer:
        for round in range(1, 9):
            write_round(writer, round)
    listed = statuses(root)
    whole = [line for line in listed if line[2]]
    assert CLIENTS <= len(whole) < len(listed) == 8 * CLIENTS
    assert listed[: len(whole)] == whole, "from some round on nothing is stored"
    assert Recording(root).verify() == []
    stored = sum((root / name).stat().st_size for name in files(root) if "index" not in name)
    assert stored <= budget
    reasons = {e.status for e in Recording(root).entries(status="error")}
    assert any(
        "the 9,000 bytes that the recording may take are used up" in reason for reason in reasons
    )
    with RecordingWriter.open(root, MANIFEST, resume=True, budget=budget) as writer:
        assert not any(entry.ok for entry in write_round(writer, 1)), "it counts what is there"
    with RecordingWriter.open(root, MANIFEST, resume=True, budget=10 * budget) as writer:
        assert all(entry.ok for entry in write_round(writer, 1))


def test_refusals_and_the_return_of_room_are_told_as_soon_as_there_is_some(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "r"
    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        disk.full = ("refused", "updates")
        write_round(writer, 1)
        writer.put_refusals([Refusal(attempt=1, round=1, n=0, node="1", reason="no")])
        assert list(Recording(root).refusals()) == []
        disk.full = ()
        write_round(writer, 2)
    assert [r.round for r in Recording(root).refusals()] == [1]
    assert [r.getMessage() for r in caplog.records][-1] == "recording goes on"


def test_one_reply_that_does_not_fit_leaves_the_others(tmp_path: Path) -> None:
    root, huge = tmp_path / "r", {"w": np.zeros(10**6, np.float32)}
    with RecordingWriter.open(root, MANIFEST, budget=100_000) as writer:
        for round in (1, 2, 3):
            _, sent = writer.put_global({n: a + np.float32(round) for n, a in WEIGHTS.items()})
            arrays: tuple[Arrays, ...] = (WEIGHTS, huge, WEIGHTS)
            writer.extend(Reply(round, str(n), a, 1, sent) for n, a in enumerate(arrays))
            writer.end_round(round)
    expected = [(r, str(node), node != 1) for r in (1, 2, 3) for node in range(3)]
    assert statuses(root) == expected
    assert [e.n for e in Recording(root).entries(status=None)] == list(range(9))
    assert Recording(root).verify() == []


def test_a_failing_look_at_the_index_costs_none_of_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, stat = tmp_path / "r", Path.stat
    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        write_round(writer, 1)

        def failing(path: Path, **options: bool) -> os.stat_result:
            if path.suffix == ".jsonl":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", failing)
        write_round(writer, 2)
        monkeypatch.undo()
        write_round(writer, 3)
    assert [line[:2] for line in statuses(root)] == [line[:2] for line in each([1, 2, 3])]
    assert Recording(root).verify() == []


def test_a_disk_still_full_refuses_to_resume_and_damages_nothing(
    tmp_path: Path, disk: Disk
) -> None:
    root = tmp_path / "r"
    writer = RecordingWriter.open(root, MANIFEST, patient=True)
    write_round(writer, 1)
    disk.full = ("index",)
    write_round(writer, 2)
    writer._owned.close()  # killed here, with the updates of round 2 stored
    with pytest.raises(RecordingError, match="No space left on device"):
        RecordingWriter.open(root, MANIFEST, resume=True, patient=True)
    disk.full = ()
    with RecordingWriter.open(root, MANIFEST, resume=True, patient=True) as writer:
        write_round(writer, 1)
    listed = [(e.attempt, e.n) for e in Recording(root).entries(status=None)]
    assert listed == [(1, n) for n in range(6)] + [(2, n) for n in range(3)]
    assert Recording(root).verify() == []


def test_a_file_system_that_can_only_be_read_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, refused = tmp_path / "r", OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse(*_: object) -> None:
        raise refused

    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        write_round(writer, 1)
        for name in ("truncate", "open"):
            monkeypatch.setattr(f"fl_privacy.recording_store.os.{name}", refuse)
        write_round(writer, 2)
        monkeypatch.undo()
        write_round(writer, 3)
    assert statuses(root) == each([1, 2, 3], missing=[2])
    assert Recording(root).verify() == []


def test_an_error_reply_to_what_was_not_stored_names_no_file(tmp_path: Path, disk: Disk) -> None:
    root = tmp_path / "r"
    with RecordingWriter.open(root, MANIFEST, patient=True) as writer:
        disk.full = ("globals",)
        _, sent = writer.put_global(WEIGHTS)
        writer.end_round(1)
        error = Reply(1, "0", None, None, sent, status="error: killed")
        (entry,) = writer.extend([error])
    assert (entry.status, entry.global_digest) == ("error: killed", "")
    assert Recording(root).verify() == []


def test_what_was_lost_is_stored_when_it_is_sent_again(tmp_path: Path, disk: Disk) -> None:
    arrays = ArrayRecord({"w": Array(WEIGHTS["w"])})
    with RecordingWriter.open(tmp_path / "r", MANIFEST, patient=True) as writer:
        recorder = Recorder(writer, NO_LAYOUT)
        content = RecordDict({"arrays": arrays})
        disk.full = ("globals",)
        lost = recorder.sent(content)
        writer.end_round(1)
        assert not writer.holds(lost.digest)
        disk.full = ()
        assert recorder.sent(content) == lost
        assert writer.holds(lost.digest)
        entry = writer.append(
            round=2, node="0", arrays=WEIGHTS, num_examples=1, global_digest=lost.digest
        )
    assert entry.ok
    assert Recording(tmp_path / "r").verify() == []


def test_the_end_of_a_run_tells_what_is_missing_and_why(tmp_path: Path, disk: Disk) -> None:
    with RecordingWriter.open(tmp_path / "recording", MANIFEST, patient=True) as writer:
        write_round(writer, 1)
        assert recorded(tmp_path).startswith(f"Recorded in {tmp_path}.")
        disk.full = ("updates",)
        write_round(writer, 2)
        disk.full = ()
    assert recorded(tmp_path).startswith("3 of 6 replies are not recorded: ")
    assert "No space left on device" in recorded(tmp_path)


def test_an_impatient_one_says_what_is_wrong(tmp_path: Path, disk: Disk) -> None:
    disk.full = ("updates",)
    with (
        RecordingWriter.open(tmp_path / "r", MANIFEST) as writer,
        pytest.raises(RecordingError, match="No space left on device"),
    ):
        write_round(writer, 1)

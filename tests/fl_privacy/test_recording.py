"""The recording format: what goes in comes out, and damage is named."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_privacy import recording_store, recording_writer
from fl_privacy.recording import (
    Entry,
    Layout,
    Manifest,
    Recording,
    RecordingError,
    RecordingWriter,
    Reply,
    Schema,
    check_fits,
    match_names,
)
from fl_privacy.recording_format import STORABLE
from fl_privacy.recording_opening import create
from fl_privacy.recording_store import Store
from fl_privacy.types import LocalTraining, Task

MANIFEST = Manifest(
    created="2025-01-01T00:00:00Z",
    model="mlp",
    dataset="digits",
    task=Task(input_shape=(1, 8, 8), classes=10, mean=(0.5,), std=(0.5,)),
    local_training=LocalTraining(),
    run_config={"lr": 0.1, "audit": False, "seed": 3, "order": "shuffled"},
    versions={"flwr": "1.39.0"},
    code_digest="abc",
)
WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, dtype=np.float32)}
_urls = (f"memory://recording-{i}" for i in count())


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run/recording") if request.param == "local" else next(_urls)


def reply(writer: RecordingWriter, round: int = 1, node: str = "7", shift: float = 1) -> Entry:
    _, sent = writer.put_global(WEIGHTS)
    return writer.append(
        round=round,
        node=node,
        arrays={name: array + np.float32(shift) for name, array in WEIGHTS.items()},
        num_examples=round,
        global_digest=sent,
    )


def failure(writer: RecordingWriter, status: str = "error: lost", node: str = "7") -> Entry:
    return writer.append(
        round=1, node=node, arrays=None, num_examples=None, global_digest="", status=status
    )


def record(location: str | Path, rounds: int = 3, clients: int = 2) -> Recording:
    with RecordingWriter.open(location, MANIFEST) as writer:
        for round in range(1, rounds + 1):
            for client in range(clients):
                reply(writer, round, str(client), shift=client)
            writer.end_round(round)
    return Recording(location)


def test_what_was_exchanged_comes_back(location: str) -> None:
    recording = record(location)
    assert recording.manifest == MANIFEST
    entries = list(recording.entries())
    assert [(e.attempt, e.round, e.node) for e in entries] == [
        (1, r, n) for r in (1, 2, 3) for n in ("0", "1")
    ]
    for entry in entries:
        assert list(recording.sent(entry)) == list(recording.returned(entry)) == ["w", "b"]
        for name, array in WEIGHTS.items():
            assert np.array_equal(recording.sent(entry)[name].numpy(), array)
            shifted = array + np.float32(int(entry.node))
            assert np.array_equal(recording.returned(entry)[name].numpy(), shifted)
        assert recording.schema(entry.schema_digest).shapes == {"w": (2, 3), "b": (2,)}
    assert recording.verify() == []


def test_entries_are_filtered(location: str) -> None:
    recording = record(location)
    assert {e.round for e in recording.entries(rounds={1, 3})} == {1, 3}
    assert {e.node for e in recording.entries(nodes=["1"])} == {"1"}
    assert list(recording.entries(attempt=2)) == []
    assert list(recording.entries(status="error")) == []
    assert len(list(recording.entries(status=None))) == 6


def test_an_unknown_tensor_is_a_key_error(location: str) -> None:
    recording = record(location)
    with pytest.raises(KeyError):
        recording.returned(next(recording.entries()))["nope"]


def test_equal_contents_are_stored_once(tmp_path: Path) -> None:
    record(tmp_path / "r", rounds=5)
    assert len(list((tmp_path / "r/globals").iterdir())) == 1
    assert len(list((tmp_path / "r/schemas").iterdir())) == 1


NAMES = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from(["__metadata__", "t0", "a.b/c", "0", ""])),
    unique=True,
    max_size=5,
)
DTYPES = st.sampled_from(sorted(STORABLE)).flatmap(
    lambda name: st.sampled_from([np.dtype(name), np.dtype(name).newbyteorder(">")])
)


@st.composite
def any_array(draw: st.DrawFn) -> np.ndarray:
    """Any dtype, byte order, shape (empty and () included) and memory layout."""
    shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    array = draw(hnp.arrays(draw(DTYPES), draw(shape)))
    layouts = [array, np.asfortranarray(array) if array.ndim else array, array.T]
    if array.ndim:
        layouts.append(np.repeat(array, 2, axis=0)[::2])
    return draw(st.sampled_from(layouts))


@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_any_arrays_and_names_survive_bit_for_bit(names: list[str], data: st.DataObject) -> None:
    arrays = {name: data.draw(any_array()) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        location = Path(folder) / "r"
        with RecordingWriter.open(location, MANIFEST) as writer:
            _, sent = writer.put_global(arrays)
            writer.append(round=1, node="1", arrays=arrays, num_examples=None, global_digest=sent)
        recording = Recording(location)
        (entry,) = recording.entries()
        for got in (recording.sent(entry), recording.returned(entry)):
            assert list(got) == names
            for name, array in arrays.items():
                little = array.astype(array.dtype.newbyteorder("<"), order="C")
                assert tuple(got[name].shape) == array.shape
                assert got[name].numpy().dtype.name == array.dtype.name
                assert got[name].numpy().tobytes() == little.tobytes()


def test_a_dtype_without_a_place_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        for arrays in ({"x": np.zeros(2, dtype=np.complex128)}, {"x": np.array([{}])}):
            with pytest.raises(RecordingError, match=r"tensor 'x' has dtype .*, expected one of"):
                writer.put_global(arrays)
    assert not (tmp_path / "r/globals").exists()


def test_a_group_with_a_reply_that_cannot_be_stored_lists_nothing(location: str) -> None:
    good = Reply(1, "7", WEIGHTS, 1, "")
    with RecordingWriter.open(location, MANIFEST) as writer:
        with pytest.raises(RecordingError, match="complex128"):
            writer.extend([good, Reply(1, "8", {"x": np.zeros(1, dtype=complex)}, 1, "")])
        assert list(Recording(location).entries(status=None)) == []
        writer.extend([good, good])
    assert [e.n for e in Recording(location).entries()] == [0, 1]
    assert Recording(location).verify() == []


def test_failures_are_listed_and_every_line_keeps_its_limit(tmp_path: Path) -> None:
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        for status in ("error: x", "error: " + 'é\n"\\' * 400, "error: \ud800", "error: 中" * 99):
            failure(writer, status, node=str(2**63))
        with pytest.raises(RecordingError, match="shorter node name"):
            failure(writer, node="n" * 600)
    lines = (tmp_path / "r/index/000000.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    assert max(len(line) for line in lines) <= 512
    recording = Recording(tmp_path / "r")
    assert all(not e.ok and e.file == "" for e in recording.entries(status="error"))
    with pytest.raises(RecordingError, match=r"returned nothing in round 1 \(error: x\)"):
        recording.returned(next(recording.entries(status="error")))


def test_segments_hold_a_thousand_lines(location: str) -> None:
    with RecordingWriter.open(location, MANIFEST) as writer:
        lost = Reply(1, "7", None, None, "", status="error: lost")
        for _ in range(3):
            assert len(writer.extend([lost] * 700)) == 700
    filesystem, root = fsspec.core.url_to_fs(location)
    segments = sorted(filesystem.ls(f"{root}/index", detail=False))
    assert [s.rsplit("/")[-1] for s in segments] == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]
    assert [filesystem.cat_file(s).count(b"\n") for s in segments] == [1000, 1000, 100]
    with RecordingWriter.open(location, MANIFEST, resume=True) as writer:
        failure(writer)
    assert filesystem.cat_file(segments[-1]).count(b"\n") == 101
    entries = list(Recording(location).entries(status=None))
    assert [(e.attempt, e.n) for e in entries] == [*((1, n) for n in range(2100)), (2, 0)]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    record(tmp_path / "run/recording")
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_node_names_are_never_paths(tmp_path: Path) -> None:
    with RecordingWriter.open(tmp_path / "run/recording", MANIFEST) as writer:
        entry = reply(writer, node="../../../escaped")
    assert entry.file == "updates/1/1/0.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def peak_of(rounds: int, folder: Path) -> int:
    """Peak bytes that Python allocates while recording."""
    with RecordingWriter.open(folder / str(rounds), MANIFEST) as writer:
        reply(writer)
        tracemalloc.start()
        for round in range(1, rounds + 1):
            for client in range(4):
                reply(writer, round, str(client), shift=round)
            writer.end_round(round)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    peak_of(3, tmp_path)
    assert peak_of(100, tmp_path) <= peak_of(10, tmp_path) + 16 * 1024


# --- opening ---------------------------------------------------------------------------


def test_an_existing_recording_is_only_resumed_on_request(location: str) -> None:
    record(location)
    with pytest.raises(RecordingError, match="already holds a recording; choose a new folder"):
        RecordingWriter.open(location, MANIFEST)
    later = MANIFEST.model_copy(update={"created": "2026-01-01T00:00:00Z"})
    with RecordingWriter.open(location, later, resume=True) as writer:
        assert writer.attempt == 2
        reply(writer)
    assert Recording(location).manifest == MANIFEST
    assert [e.attempt for e in Recording(location).entries(rounds=[1])] == [1, 1, 2]
    assert Recording(location).verify() == []


def test_another_model_does_not_resume_a_recording(location: str) -> None:
    record(location)
    other = MANIFEST.model_copy(update={"model": "lenet-zhu"})
    with pytest.raises(RecordingError, match="holds model mlp, the run to resume has lenet-zhu"):
        RecordingWriter.open(location, other, resume=True)


def test_only_what_decides_no_number_may_change_on_resuming(location: str) -> None:
    told = {"strategy": "krum", "num-server-rounds": 3, "record-rounds": "1", "resume": False}
    first = MANIFEST.model_copy(update={"run_config": told})
    RecordingWriter.open(location, first).close()
    free = {"num-server-rounds": 9, "record-rounds": "", "resume": True, "of-a-later-version": 1}
    same = MANIFEST.model_copy(update={"run_config": {**told, **free}})
    RecordingWriter.open(location, same, resume=True).close()
    other = MANIFEST.model_copy(update={"run_config": {**told, "strategy": "fedavg"}})
    with pytest.raises(RecordingError, match="holds strategy krum, the run to resume has fedavg"):
        RecordingWriter.open(location, other, resume=True)


def test_a_folder_of_something_else_is_left_alone(location: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(location)
    filesystem.makedirs(root, exist_ok=True)
    filesystem.pipe_file(f"{root}/thesis.tex", b"years of work")
    for resume in (False, True):
        with pytest.raises(RecordingError, match=r"not a recording \(it holds thesis.tex\)"):
            RecordingWriter.open(location, MANIFEST, resume=resume)
    with pytest.raises(RecordingError, match=r"manifest.json: not found; .* is not a recording"):
        Recording(location)


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "manifest.json.123.tmp").touch()  # a kill before the first rename
    record(tmp_path)


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"runs/a: expected an absolute folder"):
        RecordingWriter.open("runs/a", MANIFEST)
    (tmp_path / "file").touch()
    for location in (tmp_path / "file", tmp_path / "file/recording"):
        with pytest.raises(RecordingError, match=str(location)):
            RecordingWriter.open(location, MANIFEST)
    with pytest.raises(RecordingError, match="nosuch://x"):
        Recording("nosuch://x")


def test_a_recording_has_one_writer(tmp_path: Path) -> None:
    with (
        RecordingWriter.open(tmp_path / "r", MANIFEST),
        pytest.raises(RecordingError, match="another process is writing it"),
    ):
        RecordingWriter.open(tmp_path / "r", MANIFEST, resume=True)
    RecordingWriter.open(tmp_path / "r", MANIFEST, resume=True).close()


def test_the_lock_comes_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two creators: the second arrives when the first has not yet written its manifest."""

    def create_while_another_comes(store: Store, manifest: Manifest) -> None:
        monkeypatch.undo()
        with pytest.raises(RecordingError, match="another process is writing it"):
            RecordingWriter.open(tmp_path / "r", MANIFEST)
        create(store, manifest)

    monkeypatch.setattr(recording_writer, "create", create_while_another_comes)
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        reply(writer)
    assert Recording(tmp_path / "r").verify() == []


def test_a_refused_opening_leaves_no_lock(tmp_path: Path) -> None:
    record(tmp_path / "r")
    for _ in range(2):
        with pytest.raises(RecordingError, match="already holds a recording"):
            RecordingWriter.open(tmp_path / "r", MANIFEST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2}', r"manifest.json: format version 2.*upgrade fl-privacy"),
        ("{", r"manifest.json: not a manifest"),
        ("[]", r"manifest.json: not a manifest"),
        ("{}", r"manifest.json: not a manifest"),
        ('{"format_version": 1}', r"manifest.json: not a manifest"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    record(tmp_path / "r")
    (tmp_path / "r/manifest.json").write_text(text)
    with pytest.raises(RecordingError, match=message):
        Recording(tmp_path / "r")
    with pytest.raises(RecordingError, match=message):
        RecordingWriter.open(tmp_path / "r", MANIFEST, resume=True)


# --- damage ----------------------------------------------------------------------------


def files_of(root: Path) -> Iterator[Path]:
    for folder in ("index", "schemas", "globals", "updates"):
        yield from sorted(path for path in (root / folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove"])
def test_verify_names_every_damaged_file(damage: str, tmp_path: Path) -> None:
    root = tmp_path / "r"
    record(root, rounds=1)
    rng = random.Random(3)
    for path in files_of(root):
        intact = path.read_bytes()
        if "index" in str(path) and damage in ("remove", "extend"):
            continue  # an index that ends early is a recording that ended early
        for _ in range(20):
            data = bytearray(intact)
            position = rng.randrange(len(data) - 1)
            if damage == "flip":
                data[position] ^= 1 << rng.randrange(8)
            elif damage == "truncate":
                del data[position:]
            elif damage == "extend":
                data += b"\0"
            path.write_bytes(data)
            if damage == "remove":
                path.unlink()
            if damage == "truncate" and "index" in str(path):
                assert len(list(Recording(root).entries())) == bytes(data).count(b"\n")
            else:
                assert Recording(root).verify(), (path, position)
            path.write_bytes(intact)
    assert Recording(root).verify() == []


def test_reading_damaged_tensors_names_the_file(tmp_path: Path) -> None:
    recording = record(tmp_path / "r", rounds=1, clients=1)
    (entry,) = recording.entries()
    update = tmp_path / "r" / entry.file
    sent = tmp_path / "r/globals" / f"{entry.global_digest}.safetensors"
    for path, read in ((update, recording.returned), (sent, recording.sent)):
        intact = path.read_bytes()
        tensors = read(entry)
        path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        with pytest.raises(RecordingError, match=rf"{path.name}: the content does not match"):
            tensors["w"]
        path.write_bytes(intact[:-3])
        with pytest.raises(RecordingError, match=path.name):
            read(entry)["w"]
        path.unlink()
        with pytest.raises(RecordingError, match=path.name):
            Recording(tmp_path / "r").sent(entry)["w"] if path == sent else read(entry)["w"]
        path.write_bytes(intact)


def test_a_damaged_line_is_named_with_its_number(tmp_path: Path) -> None:
    record(tmp_path / "r")
    path = tmp_path / "r/index/000000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"attempt": "x"}\n', *lines[3:]]))
    with pytest.raises(RecordingError, match=r"000000.jsonl: line 4 is damaged"):
        list(Recording(tmp_path / "r").entries())


@pytest.mark.parametrize("gone", ["000000.jsonl", "000001.jsonl", "000002.jsonl"])
def test_a_missing_segment_is_named(gone: str, tmp_path: Path) -> None:
    root = tmp_path / "r"
    lost = Reply(1, "7", None, None, "", status="error: lost")
    with RecordingWriter.open(root, MANIFEST) as writer:
        writer.extend([lost] * 2000)
        for round in (2, 3):
            writer.extend([Reply(round, "7", WEIGHTS, 1, writer.put_global(WEIGHTS)[1])])
    assert Recording(root).verify() == []
    (root / "index" / gone).unlink()
    problem, *_ = Recording(root).verify()
    assert f"index/{gone}: " in problem
    if gone != "000002.jsonl":  # the end of an index cannot be told from a run that ended there
        for use in (
            lambda: list(Recording(root).entries()),
            lambda: RecordingWriter.open(root, MANIFEST, resume=True),
        ):
            with pytest.raises(RecordingError, match=rf"{gone}: the file is missing"):
                use()


def test_a_missing_index_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "r"
    record(root)
    shutil.rmtree(root / "index")
    (problem,) = Recording(root).verify()
    assert "index/000000.jsonl: lines are missing, updates of 3 rounds of attempt 1" in problem
    assert len(Recording(root).unlisted()) == 6


def test_missing_lines_are_noticed(tmp_path: Path) -> None:
    root = tmp_path / "r"
    lost = Reply(1, "7", None, None, "", status="error: lost")
    with RecordingWriter.open(root, MANIFEST) as writer:
        writer.extend([lost] * 1005)
    for name, line in (("000000.jsonl", 7), ("000001.jsonl", 2)):
        path = root / "index" / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: line - 1] + lines[line:]))
        assert f"{name}: " in Recording(root).verify()[0]
        path.write_bytes(b"".join(lines))
    assert Recording(root).verify() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "/etc/passwd"),
        ("file", "updates/1/1/../../../../secret.safetensors"),
        ("file", "updates/1/1/0.safetensors\n"),
        ("file", "globals/x.safetensors"),
        ("sha256", "../../x"),
        ("schema", "../manifest"),
        ("global", "../../x"),
    ],
)
def test_a_line_that_leaves_the_recording_is_refused(key: str, value: str, tmp_path: Path) -> None:
    record(tmp_path / "r", rounds=1, clients=1)
    index = tmp_path / "r/index/000000.jsonl"
    index.write_text(json.dumps({**json.loads(index.read_text()), key: value}) + "\n")
    with pytest.raises(RecordingError, match=r"000000.jsonl: line 1 is damaged"):
        list(Recording(tmp_path / "r").entries())


# --- after a kill ----------------------------------------------------------------------


def test_a_torn_tail_is_ignored_then_cut_and_its_update_adopted(tmp_path: Path) -> None:
    root = tmp_path / "r"
    record(root)
    index = root / "index/000000.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole[:-40])
    assert len(list(Recording(root).entries())) == 5
    assert Recording(root).verify() == []
    RecordingWriter.open(root, MANIFEST, resume=True).close()
    assert index.read_bytes() == whole


def test_lines_an_object_store_never_got_are_rebuilt_from_the_updates() -> None:
    location = next(_urls)
    writer = RecordingWriter.open(location, MANIFEST)
    expected = [reply(writer, 1, str(node), shift=node) for node in range(12)]
    assert list(Recording(location).entries()) == []  # killed before the round ended
    with RecordingWriter.open(location, MANIFEST, resume=True) as resumed:
        assert resumed.attempt == 2
    assert list(Recording(location).entries()) == expected
    assert Recording(location).verify() == []


def disk_full_after(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index takes ``size`` more bytes, then nothing."""
    write = recording_store._write

    def write_some(path: Path, data: bytes, flags: int) -> None:
        if path.parent.name != "index":
            return write(path, data, flags)
        write(path, data[:size], flags)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recording_store, "_write", write_some)


@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_full_disk_loses_nothing_that_was_stored(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "r"
    with RecordingWriter.open(root, MANIFEST) as writer:
        first = reply(writer)
        disk_full_after(size, monkeypatch)
        with pytest.raises(RecordingError, match=r"000000.jsonl: cannot be written \(No"):
            writer.extend([Reply(1, str(i), WEIGHTS, i, first.global_digest) for i in range(2)])
        monkeypatch.undo()
        for use in (lambda: reply(writer, 2), lambda: writer.end_round(1)):
            with pytest.raises(RecordingError, match="nothing more is recorded, resume the run"):
                use()
    assert Recording(root).verify() == []
    with RecordingWriter.open(root, MANIFEST, resume=True) as writer:
        reply(writer)
    entries = list(Recording(root).entries())
    assert [(e.attempt, e.n, e.node) for e in entries] == [
        (1, 0, "7"),
        (1, 1, "0"),
        (1, 2, "1"),
        (2, 0, "7"),
    ]
    assert Recording(root).verify() == []


def test_a_failure_that_was_not_listed_leaves_no_gap() -> None:
    location = next(_urls)
    writer = RecordingWriter.open(location, MANIFEST)
    kept = [reply(writer), failure(writer), failure(writer), reply(writer)]  # killed here
    RecordingWriter.open(location, MANIFEST, resume=True).close()
    entries = list(Recording(location).entries(status=None))
    assert [e.n for e in entries] == [0, 1, 2, 3]
    assert [e for e in entries if e.ok] == [kept[0], kept[3]]
    assert {e.status for e in entries if not e.ok} == {"error: lost, the recording was interrupted"}
    assert Recording(location).verify() == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_kill_while_resuming_doubles_nothing(whole: bool, tmp_path: Path) -> None:
    root = tmp_path / "r"
    record(root)
    index = root / "index/000000.jsonl"
    intact = index.read_bytes()
    temporary = index.with_name("000000.jsonl.123.tmp")
    temporary.write_bytes(intact if whole else intact[:-200])
    index.write_bytes(intact[:-40])
    assert len(list(Recording(root).entries())) == 5
    assert Recording(root).verify() == []
    RecordingWriter.open(root, MANIFEST, resume=True).close()
    assert index.read_bytes() == intact
    assert list(root.rglob("*.tmp")) == []


class Killed(BaseException):
    """Nothing may catch it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all writes, syncs and renames from number ``step`` on not happen; writes by half."""
    passed = 0

    def kill(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed <= step:
                return real(*args)
            if name == "write" and passed == step + 1:
                real(args[0], args[1][: len(args[1]) // 2])
            raise Killed

        return call

    for name in ("write", "fsync", "replace"):
        owner: Any = Path if name == "replace" else os
        monkeypatch.setattr(owner, name, kill(name, getattr(owner, name)))


def test_a_resumption_may_be_killed_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "whole", rounds=1, clients=4)
    index = tmp_path / "whole/index/000000.jsonl"
    intact = index.read_bytes()
    index.write_bytes(b"".join(intact.splitlines(keepends=True)[:2]) + intact[-99:-9])
    for step in count():
        root = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", root)
        killed_at(step, monkeypatch)
        try:
            RecordingWriter.open(root, MANIFEST, resume=True).close()
            break
        except Killed:
            monkeypatch.undo()
        assert 2 <= len(list(Recording(root).entries())) <= 4
        assert Recording(root).verify() == []
        RecordingWriter.open(root, MANIFEST, resume=True).close()
        assert (root / "index/000000.jsonl").read_bytes() == intact, step
    assert step > 6


def test_cut_and_temporary_files_are_not_adopted(tmp_path: Path) -> None:
    root = tmp_path / "r"
    record(root)
    (whole,) = (root / "updates/1/1").glob("0.safetensors")
    (root / "updates/1/3/90.safetensors").write_bytes(whole.read_bytes()[:-1])
    (root / "updates/1/3/91.safetensors").write_bytes(b"")
    (root / "updates/1/3/92.safetensors.1.tmp").write_bytes(whole.read_bytes())
    (root / "globals/x.safetensors.1.tmp").write_bytes(b"")
    with RecordingWriter.open(root, MANIFEST, resume=True) as writer:
        reply(writer)
    assert len(list(Recording(root).entries())) == 7
    assert list(root.rglob("*.tmp")) == []
    assert Recording(root).verify() == []


# --- models ----------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight


def schema_of(model: nn.Module, legacy: bool = False) -> Schema:
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    if legacy:
        arrays = {str(i): v for i, v in enumerate(arrays.values())}
    return Schema.of(arrays, Layout.of(model))


def test_a_layout_tells_parameters_buffers_and_tied_weights() -> None:
    schema = schema_of(Tied())
    assert {t.name: t.kind for t in schema.tensors} == {
        "encode.weight": "parameter",
        "encode.bias": "parameter",
        "norm.weight": "parameter",
        "norm.bias": "parameter",
        "norm.running_mean": "buffer",
        "norm.running_var": "buffer",
        "norm.num_batches_tracked": "buffer",
        "decode.weight": "parameter",
    }
    assert schema.aliases == {"decode.weight": "encode.weight"}


def test_schemas_survive_storage_and_stay_readable(tmp_path: Path) -> None:
    model = Tied()
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        sha, _ = writer.put_global(arrays, Layout.of(model))
    assert Recording(tmp_path / "r").schema(sha) == schema_of(model)
    stored = json.loads((tmp_path / f"r/schemas/{sha}.json").read_text())
    assert [t["name"] for t in stored["tensors"]] == list(arrays)


def test_names_match_by_name_or_for_legacy_arrays_by_order() -> None:
    model = Tied()
    names = list(model.state_dict())
    assert match_names(model.state_dict(), schema_of(model)) == {n: n for n in names}
    legacy = match_names(model.state_dict(), schema_of(model, legacy=True))
    assert legacy == {str(i): n for i, n in enumerate(names)}


def test_a_sequential_model_has_its_own_numbers() -> None:
    model = nn.ParameterList([torch.zeros(2), torch.zeros(3)])
    assert match_names(model.state_dict(), schema_of(model)) == {"0": "0", "1": "1"}


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (nn.Linear(4, 2), r"'weight': the model expects shape \(2, 3\).*\(2, 4\)"),
        (nn.Linear(3, 2, bias=False), r"'bias' of the model is not in the recording"),
        (
            nn.Sequential(nn.Linear(3, 2)),
            r"'weight' of the model is not in the recording.*0.weight",
        ),
    ],
)
def test_a_model_that_does_not_fit_names_the_first_tensor(
    recorded: nn.Module, message: str
) -> None:
    with pytest.raises(RecordingError, match=message):
        match_names(nn.Linear(3, 2).state_dict(), schema_of(recorded))


def test_a_model_that_is_too_small_names_the_tensor_it_lacks() -> None:
    small = nn.Linear(3, 2, bias=False).state_dict()
    with pytest.raises(RecordingError, match="'bias' of the recording is not in the model"):
        check_fits(small, schema_of(nn.Linear(3, 2)).shapes)


def test_legacy_arrays_of_another_model_are_refused() -> None:
    state = nn.Linear(3, 2).state_dict()
    with pytest.raises(RecordingError, match=r"1 unnamed arrays, the model has 2.*'bias'"):
        match_names(state, schema_of(nn.Linear(3, 2, bias=False), legacy=True))
    with pytest.raises(RecordingError, match=r"array 0 .*\(2, 4\).*'weight'.*\(2, 3\)"):
        match_names(state, schema_of(nn.Linear(4, 2), legacy=True))
    longer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    with pytest.raises(RecordingError, match=r"array 2, of shape \(5, 2\), belongs to none"):
        match_names(state, schema_of(longer, legacy=True))
    with pytest.raises(RecordingError, match=r"array 1 .*\(2,\).*'1\.weight'.*\(2, 2\)"):
        other = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2))
        match_names(other.state_dict(), schema_of(longer, legacy=True))

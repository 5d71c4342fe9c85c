"""Results: what is written reads back, whatever moment the writer was killed at."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from fl_privacy import recording_store
from fl_privacy.results import (
    Cell,
    MetricInfo,
    ResultConfig,
    ResultError,
    ResultSet,
    ResultWriter,
    load_results,
    rounds_of,
)
from fl_privacy.types import Outcome, Reconstruction, Task


def config(**changes: object) -> ResultConfig:
    plain = ResultConfig(
        name="gradient_similarity",
        adversary="gradient_similarity(steps=10)",
        threat_model={"unit": "update", "withheld": []},
        seed=0,
        device="cpu",
        width=4,
        recording_digest="ab" * 32,
        metrics=(MetricInfo(name="psnr", unit="dB", higher_is_leakier=True),),
    )
    return plain.model_copy(update=changes)


def row(key: str, **changes: Cell) -> dict[str, Cell]:
    return {
        "key": key,
        "attempt": 1,
        "round": 2,
        "rounds": "2",
        "node": "17",
        "images": 1,
        "status": "completed",
        "message": "",
        "loss": 0.5,
        "seconds": 0.25,
        "defense": "",
        "labels": "inferred",
        "psnr": 20.0,
        **changes,
    }


def made(key: str, n: int = 2) -> Reconstruction:
    generator = torch.Generator().manual_seed(int(key, 16))
    inputs = torch.rand(n, 3, 4, 5, generator=generator).transpose(2, 3)
    return Reconstruction(key, inputs, torch.arange(n), Outcome("partial", "more steps"), 0.5, 0.25)


def write(folder: Path, keys: list[str], *, finish: bool = False) -> None:
    with ResultWriter.open(folder, config()) as writer:
        for key in keys:
            if key not in writer.done:
                partial = row(key, status="partial", message="more steps")
                writer.write_chunk([partial], {key: made(key)})
        if finish:
            writer.finish()


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "results" / config().folder_name
    write(folder, ["0b", "0a"])
    failed = row("0c", status="failed", message="no bias", psnr=None, loss=None)
    with ResultWriter.open(folder, config()) as writer:
        writer.write_chunk([failed], {})
        writer.finish()

    (read,) = load_results(tmp_path)
    assert read.config.complete
    assert read.config.digest == config().digest
    assert [r["key"] for r in read.rows()] == ["0a", "0b", "0c"]
    assert read.rows()[0] == row("0a", status="partial", message="more steps")
    for key in ("0a", "0b"):
        got, want = read.reconstruction(key), made(key)
        assert got is not None
        assert torch.equal(got.inputs, want.inputs)
        assert torch.equal(got.labels, want.labels)
        assert (got.outcome, got.loss, got.seconds) == (want.outcome, 0.5, 0.25)
    assert read.reconstruction("0c") is None
    assert read.reconstruction("ff") is None


def test_targets_may_share_one_guess(tmp_path: Path) -> None:
    guess = torch.rand(1, 1, 4, 4)
    same = {
        key: Reconstruction(
            key, guess.expand(3, 1, 4, 4), torch.zeros(3).long(), Outcome("completed")
        )
        for key in ("0a", "0b")
    }
    with ResultWriter.open(tmp_path, config()) as writer:
        writer.write_chunk([row("0a"), row("0b")], same)
    for key in same:
        got = ResultSet(tmp_path).reconstruction(key)
        assert got is not None
        assert torch.equal(got.inputs, guess.expand(3, 1, 4, 4))


def test_finish_exports_one_row_a_target(tmp_path: Path) -> None:
    write(tmp_path, ["0a", "0b"], finish=True)
    parquet = pyarrow.parquet.read_table(tmp_path / "targets.parquet")
    text = pyarrow.csv.read_csv(tmp_path / "targets.csv")
    assert parquet.equals(ResultSet(tmp_path).table)
    assert text.column_names == parquet.column_names
    assert text.num_rows == parquet.num_rows == 2


def test_what_is_not_a_number_becomes_null(tmp_path: Path) -> None:
    with ResultWriter.open(tmp_path, config()) as writer:
        writer.write_chunk([row("0a", psnr=math.nan, loss=math.nan)], {"0a": made("0a")})
    read = ResultSet(tmp_path)
    assert (read.rows()[0]["psnr"], read.rows()[0]["loss"]) == (None, None)
    result = read.reconstruction("0a")
    assert result is not None
    assert math.isnan(result.loss)


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("writes_until_death", range(1, 11))
def test_a_killed_analysis_goes_on_after_its_last_whole_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes_until_death: int
) -> None:
    keys = ["0a", "0b", "0c"]
    left = writes_until_death

    def dying(files: Iterable[tuple[Path, bytes]]) -> None:
        nonlocal left
        for path, data in files:
            left -= 1
            if left == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f"{path.name}.half").write_bytes(data[: len(data) // 2])
                raise Killed
            recording_store.write_atomically([(path, data)])

    monkeypatch.setattr("fl_privacy.results_store.write_atomically", dying)
    with pytest.raises(Killed):
        write(tmp_path, keys, finish=True)
    monkeypatch.undo()

    listed = ResultSet(tmp_path) if (tmp_path / "config.json").exists() else None
    for r in listed.rows() if listed else []:
        assert listed is not None
        assert listed.reconstruction(r["key"]) is not None
        assert not listed.config.complete
    write(tmp_path, keys, finish=True)
    read = ResultSet(tmp_path)
    assert [r["key"] for r in read.rows()] == keys
    assert all(read.reconstruction(key) is not None for key in keys)
    assert read.config.complete


def test_a_complete_analysis_takes_more_targets(tmp_path: Path) -> None:
    write(tmp_path, ["0a"], finish=True)
    created = ResultSet(tmp_path).config.created
    write(tmp_path, ["0a", "0b"])
    assert not ResultSet(tmp_path).config.complete
    write(tmp_path, [], finish=True)
    read = ResultSet(tmp_path)
    assert (len(read.rows()), read.config.complete, read.config.created) == (2, True, created)


def test_another_analysis_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    write(tmp_path, ["0a"])
    with pytest.raises(ResultError, match=r"another analysis \(seed: holds 0, wanted 1\)"):
        ResultWriter.open(tmp_path, config(seed=1))
    assert len(ResultSet(tmp_path).rows()) == 1


def test_the_digest_covers_what_decides_the_numbers_and_nothing_else() -> None:
    same = config(created="long ago", complete=True)
    assert same.digest == config().digest
    others = [
        config(seed=1),
        config(width=8),
        config(device="cuda"),
        config(adversary="gradient_similarity(steps=11)"),
        config(threat_model={"unit": "client", "withheld": []}),
        config(recording_digest="cd" * 32),
        config(oracle=("labels",)),
        config(model="mlp"),
        config(task=Task(input_shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.5,))),
        config(settings={"steps": 10, "lr": 0.1}),
        config(code_digest="ef" * 32),
        config(threads=2),
    ]
    assert len({c.digest for c in [config(), *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([row("0a", pnsr=3.0)], [], r"unknown columns \['pnsr'\]; a row has key, attempt"),
        ([row("0b")], [], "written twice: 0b"),
        ([row("0a"), row("0a")], [], "written twice: 0a"),
        ([row("")], [], "every row needs a key"),
        ([row("0a")], ["0c"], "reconstructions without a row: 0c"),
    ],
)
def test_bad_rows_are_refused(
    tmp_path: Path, rows: list[dict[str, Cell]], keys: list[str], message: str
) -> None:
    write(tmp_path, ["0b"])
    with (
        ResultWriter.open(tmp_path, config()) as writer,
        pytest.raises(ResultError, match=message),
    ):
        writer.write_chunk(rows, {key: made(key) for key in keys})
    assert [r["key"] for r in ResultSet(tmp_path).rows()] == ["0b"]


def test_unreadable_results_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"there is no config\.json"):
        ResultSet(tmp_path)
    write(tmp_path, ["0a"])
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "format_version": 2}))
    with pytest.raises(ResultError, match=r"config\.json cannot be read as results of format"):
        ResultSet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    chunk = tmp_path / "chunks" / "000000.parquet"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(ResultError, match=r"000000\.parquet is damaged"):
        ResultSet(tmp_path).rows()
    chunk.unlink()
    write(tmp_path, ["0a"], finish=True)
    assert len(ResultSet(tmp_path).rows()) == 1


def test_an_analysis_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with ResultWriter.open(tmp_path, config()) as first:
        with pytest.raises(ResultError, match="another process is writing this very analysis"):
            ResultWriter.open(tmp_path, config())
        first.write_chunk([row("0a")], {"0a": made("0a")})
    with pytest.raises(ResultError, match="another analysis"):
        ResultWriter.open(tmp_path, config(seed=1))
    write(tmp_path, ["0a", "0b"])
    assert [r["key"] for r in ResultSet(tmp_path).rows()] == ["0a", "0b"]


@pytest.mark.parametrize("error", [None, ValueError("refused")])
def test_a_writer_that_waits_goes_on_from_what_the_other_left(
    error: ValueError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results" / "x"
    first = ResultWriter.open(folder, config())

    def meanwhile(seconds: float) -> None:
        if error is None:
            first.write_chunk([row("0a")], {"0a": made("0a")})
        first.__exit__(type(error) if error else None, error, None)

    monkeypatch.setattr("fl_privacy.results_store.time.sleep", meanwhile)
    with ResultWriter.open(folder, config(), wait=True) as second:
        assert second.done == (set() if error else {"0a"})
        second.write_chunk([row("0b")], {"0b": made("0b")})
    assert [r["key"] for r in ResultSet(folder).rows()][-1] == "0b"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(ResultError, match=r"results.*cannot be written \(.*copy the run"):
        ResultWriter.open(tmp_path / "results" / "x", config())


def test_a_full_disk_is_told_and_leaves_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(files: Iterable[tuple[Path, bytes]]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path, ["0a"])
    monkeypatch.setattr("fl_privacy.results_store.write_atomically", full)
    with pytest.raises(ResultError, match=r"cannot be written \(No space left on device"):
        write(tmp_path, ["0b"])
    assert [r["key"] for r in ResultSet(tmp_path).rows()] == ["0a"]


def test_a_set_of_keys_shows_these_only(tmp_path: Path) -> None:
    write(tmp_path, ["0a", "0b"])
    some = ResultSet(tmp_path, frozenset({"0b"}))
    assert [r["key"] for r in some.rows()] == ["0b"]
    assert some.reconstruction("0a") is None
    assert some.reconstruction("0b") is not None


def test_results_older_than_a_column_are_read(tmp_path: Path) -> None:
    write(tmp_path, ["0a"])
    chunk = tmp_path / "chunks" / "000000.parquet"
    old = pyarrow.parquet.read_table(chunk).drop_columns(["rounds"])
    pyarrow.parquet.write_table(old, chunk)
    (read,) = ResultSet(tmp_path).rows()
    assert rounds_of(read) == [2]
    assert rounds_of({**read, "rounds": "1,2"}) == [1, 2]


def test_a_run_without_results_has_none(tmp_path: Path) -> None:
    assert load_results(tmp_path) == []


def test_a_name_cannot_leave_the_results_folder() -> None:
    with pytest.raises(ValueError, match="name"):
        ResultConfig.model_validate({**config().model_dump(), "name": "../elsewhere"})

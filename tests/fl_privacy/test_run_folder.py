import stat
from pathlib import Path

import pytest

from fl_privacy.recording import Manifest, Recording, RecordingError, RecordingWriter
from fl_privacy.run_folder import RunFolder, RunFolderError, open_private, writable_run_folder


@pytest.mark.parametrize("path", ["", "runs/first", "./x"])
def test_empty_and_relative_paths_are_refused_with_the_remedy(path: str) -> None:
    with pytest.raises(
        RunFolderError, match=r"absolute path, got .*-c \"out-dir='/abs/path/run'\""
    ):
        writable_run_folder(path)


def test_an_existing_recording_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = writable_run_folder(tmp_path / "run")
    failed(folder)
    before = folder.manifest.read_bytes()
    with pytest.raises(RunFolderError, match="holds a recording already"):
        writable_run_folder(tmp_path / "run")
    assert folder.manifest.read_bytes() == before
    assert writable_run_folder(tmp_path / "run", resume=True) == folder


def test_a_recording_without_any_reply_may_be_replaced(tmp_path: Path) -> None:
    folder = writable_run_folder(tmp_path / "run")
    RecordingWriter.open(folder.recording, Manifest(created="first")).close()
    assert writable_run_folder(tmp_path / "run") == folder
    failed(folder, created="second")
    assert Recording(folder.recording).manifest.created == "second"


@pytest.mark.parametrize("held", ["index/000000.jsonl", "updates/1/1/0.safetensors"])
def test_a_recording_of_which_anything_is_left_is_not_replaced(held: str, tmp_path: Path) -> None:
    folder = writable_run_folder(tmp_path / "run")
    RecordingWriter.open(folder.recording, Manifest(created="first")).close()
    (folder.recording / held).parent.mkdir(parents=True)
    (folder.recording / held).touch()
    with pytest.raises(RunFolderError, match="holds a recording already"):
        writable_run_folder(tmp_path / "run")
    with pytest.raises(RecordingError, match="already holds a recording"):
        RecordingWriter.open(folder.recording, Manifest(created="second"))


def failed(folder: RunFolder, *, created: str = "first") -> None:
    """Record that a client failed."""
    with RecordingWriter.open(folder.recording, Manifest(created=created)) as writer:
        writer.append(
            round=1,
            node="1",
            arrays=None,
            num_examples=None,
            global_digest="",
            status="error: out of luck",
        )


def test_a_new_run_folder_and_its_texts_are_the_owners_alone(tmp_path: Path) -> None:
    folder = writable_run_folder(tmp_path / "run")
    for line in ("a\n", "b\n"):
        with open_private(folder.history) as file:
            file.write(line)
    assert folder.history.read_text() == "a\nb\n"
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.history.stat().st_mode) == 0o600


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nothing to resume"):
        writable_run_folder(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write to .*file/run"):
        writable_run_folder(tmp_path / "file" / "run")

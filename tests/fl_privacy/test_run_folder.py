import stat
from pathlib import Path

import pytest

from fl_privacy.run_folder import RunFolderError, open_private, writable_run_folder


@pytest.mark.parametrize("path", ["", "runs/first", "./x"])
def test_empty_and_relative_paths_are_refused_with_the_remedy(path: str) -> None:
    with pytest.raises(
        RunFolderError, match=r"absolute path, got .*-c \"out-dir='/abs/path/run'\""
    ):
        writable_run_folder(path)


def test_an_existing_recording_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = writable_run_folder(tmp_path / "run")
    folder.recording.mkdir()
    folder.manifest.write_text("{}")
    with pytest.raises(RunFolderError, match="holds a recording already"):
        writable_run_folder(tmp_path / "run")
    assert folder.manifest.read_text() == "{}"
    assert writable_run_folder(tmp_path / "run", resume=True) == folder


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

"""The run folder: where a run's recording, truth, history, results and report lie."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fl_privacy.recording_opening import is_unused
from fl_privacy.recording_store import open_store


class RunFolderError(ValueError):
    """A run folder that cannot be used."""


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run folder; touches no file."""

    path: Path

    @property
    def recording(self) -> Path:
        """What the server saw."""
        return self.path / "recording"

    @property
    def manifest(self) -> Path:
        """Written once, before anything else is recorded."""
        return self.recording / "manifest.json"

    @property
    def truth(self) -> Path:
        """What the clients held; audits only."""
        return self.path / "truth"

    @property
    def history(self) -> Path:
        """Test accuracy and loss of the global model, one JSON line a round."""
        return self.path / "history.jsonl"

    @property
    def model(self) -> Path:
        """The global model after the last round; a resumed run goes on from it."""
        return self.path / "model.safetensors"

    @property
    def results(self) -> Path:
        """What adversaries made of the recording."""
        return self.path / "results"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        """Flower's own log of a simulation."""
        return self.path / "simulation.log"


def writable_run_folder(out_dir: str | Path, *, resume: bool = False) -> RunFolder:
    """The run folder at ``out_dir``, ready to be written; made, for its owner alone, if missing.

    A new run may take the place of one that failed before it recorded any reply.

    Raises:
        RunFolderError: the path is empty or relative, cannot be written, holds a
            recording with replies already (or, to ``resume``, holds none).
    """
    folder = RunFolder(Path(out_dir))
    if not str(out_dir) or not folder.path.is_absolute():
        raise RunFolderError(
            f"out-dir must be an absolute path, got {str(out_dir)!r}: the server runs in a folder "
            f"of its own; with flwr run, say: -c \"out-dir='/abs/path/run'\""
        )
    if not resume and folder.manifest.exists() and not is_unused(open_store(folder.recording)):
        raise RunFolderError(
            f"{folder.recording} holds a recording already: name a new folder, or resume it "
            f"(--resume; with flwr run: -c resume=true)"
        )
    if resume and not folder.manifest.exists():
        raise RunFolderError(f"nothing to resume: {folder.manifest} does not exist")
    try:
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.path):
            pass
    except OSError as error:
        raise RunFolderError(
            f"cannot write to {folder.path} ({error.strerror}): name a folder that you may write"
        ) from error
    return folder


def private_folder(path: Path) -> Path:
    """A folder for its owner alone, and each one above it that had to be made."""
    if not path.is_dir():
        private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def open_private(path: Path) -> TextIO:
    """Open a text file to append to it; a new one is its owner's alone."""
    return open(path, "a", encoding="utf-8", opener=_owner_only)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

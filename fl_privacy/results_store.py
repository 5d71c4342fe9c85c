"""Who may write a result folder, and how a write that fails is told."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fl_privacy.recording_store import write_atomically
from fl_privacy.results_format import ResultError

BUSY_SECONDS = 0.2


def own(folder: Path, *, wait: bool = False) -> int:
    """Lock a result folder, made if missing, until the descriptor is closed or the process ends.

    ``wait`` until it is free; in sleeps, which every interruption ends.

    Raises:
        ResultError: another process holds it, or it cannot be made.
    """
    while (descriptor := _locked(folder)) is None:
        if not wait:
            raise ResultError(
                f"{folder}: another process is writing this very analysis; "
                f"repeat the command when that has ended, and it goes on from there"
            )
        time.sleep(BUSY_SECONDS)
    return descriptor


def _locked(folder: Path) -> int | None:
    """The descriptor of a locked folder; None where another holds it, or has just removed it."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritable(folder, error) from None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    os.close(descriptor)
    return None


def remove_unused(folder: Path) -> None:
    """Take back a result folder that holds no target; whatever else lies in it stays.

    It runs while an error is on its way, which a second one must not hide.
    """
    with suppress(OSError):
        (folder / "config.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "chunks", ignore_errors=True)
        folder.rmdir()
        folder.parent.rmdir()


def put(files: Iterable[tuple[Path, bytes]], folder: Path) -> None:
    """Write files of a result folder; each as a whole or not at all.

    Raises:
        ResultError: no room, or not writable.
    """
    try:
        write_atomically(files)
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> ResultError:
    """What to say, and to do, when a result folder cannot be written."""
    return ResultError(
        f"{error.filename or folder}: cannot be written ({error.strerror}); "
        f"expected a run folder that is writable and has room, copy the run to one"
    )

"""Where a recording lies: a local folder, made crash-safe with ``os``, or any fsspec URL.

Paths inside a recording are relative and use ``/``. fsspec never syncs, which is why the
local folder does not go through it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from fl_privacy.recording_format import RecordingError

TEMPORARY = ".tmp"


class Store(Protocol):
    """A tree of files with atomic writes and one growing file at a time."""

    def where(self, path: str = "") -> str:
        """The full name of a file, for messages."""

    def exists(self, path: str) -> bool: ...

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing when there is no such folder."""

    def read(self, path: str) -> bytes: ...

    def put(self, path: str, data: bytes) -> None:
        """Write a file: afterwards it is there as a whole, or as it was."""

    def append(self, path: str, line: bytes) -> None:
        """Add a line; an object store keeps it until `flush`."""

    def flush(self) -> None: ...

    def remove(self, path: str) -> None: ...


def open_store(location: str | Path) -> Store:
    """The store behind a local path or a URL such as ``s3://bucket/run``."""
    text = str(location)
    if text.startswith("file://"):
        return LocalStore(Path(text.removeprefix("file://")))
    if "://" not in text:
        return LocalStore(Path(location))
    import fsspec  # a local recording does not need it

    try:
        filesystem, root = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise RecordingError(f"{text}: {error}") from error
    return RemoteStore(text, filesystem, str(root))


def make_folder(folder: Path) -> None:
    """Create a folder and its parents for the owner alone, and sync each parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _sync(folder.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder; readable by the owner alone."""
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    _write(temporary, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    temporary.replace(path)
    _sync(path.parent)


def _write(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, flags, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def where(self, path: str = "") -> str:
        return str(self.root / path)

    def exists(self, path: str) -> bool:
        try:
            return (self.root / path).exists()
        except OSError as error:
            raise RecordingError(f"{self.where(path)}: {error.strerror}") from error

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.root / folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RecordingError(f"{self.where(folder)}: {error.strerror}") from error

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            raise RecordingError(f"{self.where(path)}: the file is missing") from None
        except OSError as error:
            raise RecordingError(f"{self.where(path)}: {error.strerror}") from error

    def put(self, path: str, data: bytes) -> None:
        try:
            write_atomically(self.root / path, data)
        except OSError as error:
            raise self._unwritable(path, error) from error

    def append(self, path: str, line: bytes) -> None:
        target = self.root / path
        try:
            new = not target.exists()
            if new:
                make_folder(target.parent)
            _write(target, line, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            if new:
                _sync(target.parent)
        except OSError as error:
            raise self._unwritable(path, error) from error

    def flush(self) -> None:
        """Every line is on disk already."""

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def _unwritable(self, path: str, error: OSError) -> RecordingError:
        return RecordingError(
            f"{self.where(path)}: cannot be written ({error.strerror}); choose a folder that is "
            f"writable and has room"
        )


class RemoteStore:
    """An object store: whole files only, so the growing one is put again at each flush."""

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url.rstrip("/")
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.open_path = ""
        self.open_lines = bytearray()

    def where(self, path: str = "") -> str:
        return f"{self.url}/{path}"

    def exists(self, path: str) -> bool:
        return bool(self.filesystem.exists(f"{self.root}/{path}"))

    def names(self, folder: str) -> list[str]:
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in found)

    def read(self, path: str) -> bytes:
        try:
            return bytes(self.filesystem.cat_file(f"{self.root}/{path}"))
        except FileNotFoundError:
            raise RecordingError(f"{self.where(path)}: the file is missing") from None
        except OSError as error:
            raise RecordingError(f"{self.where(path)}: {error}") from error

    def put(self, path: str, data: bytes) -> None:
        target = f"{self.root}/{path}"
        try:
            self.filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self.filesystem.pipe_file(target, data)
        except OSError as error:
            raise RecordingError(f"{self.where(path)}: cannot be written ({error})") from error

    def append(self, path: str, line: bytes) -> None:
        if path != self.open_path:
            self.flush()
            self.open_path = path
            self.open_lines = bytearray(self.read(path) if self.exists(path) else b"")
        self.open_lines += line

    def flush(self) -> None:
        if self.open_path:
            self.put(self.open_path, bytes(self.open_lines))

    def remove(self, path: str) -> None:
        if self.exists(path):
            self.filesystem.rm_file(f"{self.root}/{path}")

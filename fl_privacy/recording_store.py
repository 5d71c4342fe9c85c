"""Where a recording lies: a local folder, made crash-safe with ``os``, or any fsspec URL.

Paths inside a recording are relative and use ``/``. fsspec never syncs, which is why the
local folder does not go through it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fl_privacy.recording_format import RecordingError

TEMPORARY = ".tmp"
SYNCS = 8


class BudgetError(RecordingError):
    """The recording has reached the size that it may have."""


class Store(Protocol):
    """A tree of files with atomic writes and one growing file at a time."""

    def where(self, path: str = "") -> str:
        """The full name of a file, for messages."""

    def exists(self, path: str) -> bool: ...

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing when there is no such folder."""

    def read(self, path: str) -> bytes: ...

    def put(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write files: afterwards they are there for good; each as a whole or not at all."""

    def append(self, path: str, lines: bytes) -> None:
        """Add lines; an object store gets them at the next `flush`."""

    def flush(self) -> None: ...

    def remove(self, path: str) -> None: ...

    def size(self) -> int:
        """Bytes of all files."""


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


def write_atomically(files: Iterable[tuple[Path, bytes]]) -> None:
    """Write files for the owner alone: after this they are on disk, as they should be.

    Temporary files, fsync, rename, fsync of the folders; a group costs little more than one
    file, because syncs that run at the same time share the disk's work. Each file is as a
    whole or not at all; the next one's bytes are asked for when one is written. What fails
    leaves no temporary files, which would keep a full disk full.
    """
    moves: list[tuple[Path, Path]] = []
    folders: set[Path] = set()
    try:
        for path, data in files:
            folders |= {path.parent, *_make_folder(path.parent)}
            temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
            moves.append((temporary, path))
            _write(temporary, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        _sync([temporary for temporary, _ in moves])
        for temporary, path in moves:
            temporary.replace(path)
    except BaseException:
        for temporary, _ in moves:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise
    _sync(list(folders))


def _make_folder(folder: Path) -> set[Path]:
    """Create a folder and its parents; the folders that have got a new entry by that."""
    if folder.is_dir():
        return set()
    changed = _make_folder(folder.parent) | {folder.parent}
    folder.mkdir(mode=0o700, exist_ok=True)
    return changed


def _write(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, flags, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _cut(path: Path, size: int) -> None:
    """Take off what an append that failed has left, and a file that it alone made."""
    if not size:
        path.unlink(missing_ok=True)
    elif path.stat().st_size != size:
        os.truncate(path, size)


def _sync(paths: Sequence[Path]) -> None:
    if len(paths) > 1:
        with ThreadPoolExecutor(min(SYNCS, len(paths))) as pool:
            list(pool.map(_sync_one, paths))
    else:
        for path in paths:
            _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._torn: tuple[Path, int] | None = None

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

    def put(self, files: Iterable[tuple[str, bytes]]) -> None:
        try:
            write_atomically((self.root / path, data) for path, data in files)
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, path: str, lines: bytes) -> None:
        """Add lines, all of them or none: what a failure leaves goes before anything is added."""
        target = self.root / path
        try:
            self._mend()
            changed = set() if target.exists() else {target.parent, *_make_folder(target.parent)}
            self._torn = (target, 0 if changed else target.stat().st_size)
            _write(target, lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            _sync([target, *changed])
            self._torn = None
        except OSError as error:
            with suppress(OSError):
                self._mend()
            raise self._unwritable(error, path) from error

    def _mend(self) -> None:
        """Take off a line that was written in part."""
        if self._torn:
            _cut(*self._torn)
        self._torn = None

    def flush(self) -> None:
        """Every line is on disk already."""

    def lock(self) -> int:
        """Make the folder and lock it until the returned descriptor is closed.

        Raises:
            RecordingError: it cannot be made, or another process has locked it.
        """
        with ExitStack() as opened:
            try:
                _sync(list(_make_folder(self.root)))
                descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
                opened.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecordingError(
                    f"{self.root}: another process is writing it; wait for it to end"
                ) from error
            except OSError as error:
                raise RecordingError(
                    f"{self.root}: cannot be written and locked ({error.strerror}); choose a new "
                    f"folder on a disk of this machine"
                ) from error
            opened.pop_all()
        return descriptor

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def _unwritable(self, error: OSError, path: str = "") -> RecordingError:
        return RecordingError(
            f"{error.filename or self.root / path}: cannot be written ({error.strerror}); choose a "
            f"folder that is writable and has room"
        )


class Budgeted:
    """A store whose files may take ``budget`` bytes in all; lines of the index always fit.

    The lines say what is missing, in at most half a kilobyte a reply.
    """

    def __init__(self, store: Store, budget: int) -> None:
        self.store = store
        self.budget = budget
        self.used = store.size()
        self.where, self.exists, self.names = store.where, store.exists, store.names
        self.read, self.flush, self.remove = store.read, store.flush, store.remove
        self.size = store.size

    def put(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write files, all of them or, beyond the budget, none.

        Raises:
            BudgetError: they do not fit any more.
        """
        told: list[int] = []

        def counted() -> Iterator[tuple[str, bytes]]:
            for path, data in files:
                told.append(len(data))
                if self.used + sum(told) > self.budget:
                    raise BudgetError(
                        f"the {self.budget:,} bytes that the recording may take are used up"
                    )
                yield path, data

        self.store.put(counted())
        self.used += sum(told)

    def append(self, path: str, lines: bytes) -> None:
        self.store.append(path, lines)
        self.used += len(lines)


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

    @contextmanager
    def _asking(self, path: str = "") -> Iterator[None]:
        """What the store reports, in the recording's words; that something is missing passes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RecordingError(f"{self.where(path)}: {error}") from error

    def exists(self, path: str) -> bool:
        with self._asking(path):
            return bool(self.filesystem.exists(f"{self.root}/{path}"))

    def names(self, folder: str) -> list[str]:
        self.filesystem.invalidate_cache()
        try:
            with self._asking(folder):
                found = self.filesystem.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in found)

    def read(self, path: str) -> bytes:
        try:
            with self._asking(path):
                return bytes(self.filesystem.cat_file(f"{self.root}/{path}"))
        except FileNotFoundError:
            raise RecordingError(f"{self.where(path)}: the file is missing") from None

    def put(self, files: Iterable[tuple[str, bytes]]) -> None:
        for path, data in files:
            target = f"{self.root}/{path}"
            try:
                self.filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                self.filesystem.pipe_file(target, data)
            except OSError as error:
                raise RecordingError(f"{self.where(path)}: cannot be written ({error})") from error

    def append(self, path: str, lines: bytes) -> None:
        if path != self.open_path:
            self.flush()
            self.open_path = path
            self.open_lines = bytearray(self.read(path) if self.exists(path) else b"")
        self.open_lines += lines

    def flush(self) -> None:
        if self.open_path:
            self.put([(self.open_path, bytes(self.open_lines))])

    def size(self) -> int:
        try:
            with self._asking():
                return int(self.filesystem.du(self.root))
        except FileNotFoundError:
            return 0

    def remove(self, path: str) -> None:
        with self._asking(path), suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.root}/{path}")

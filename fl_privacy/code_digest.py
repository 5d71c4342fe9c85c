"""A digest of the code that runs, to notice a stale copy on another process's path."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("fl_privacy", "strategies", "clients", "adversaries")


@cache
def code_digest() -> str:
    """SHA-256 (hex) over the .py files of the four packages beside this one, path by path.

    Read once a process, from where this very module was imported.
    """
    root = Path(__file__).resolve().parent.parent
    return digest_of(root)


def digest_of(root: Path) -> str:
    """The digest of the packages below ``root``; file names and contents count, nothing else."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            total.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()

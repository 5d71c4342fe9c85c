"""Find and end every process of a group that carries a mark in its environment.

Flower and Ray start helpers in sessions of their own, so neither a process group nor
the tree below one child holds them all. The environment is inherited by every one;
children of a marked process count too, because a process title may overwrite it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

MEMORY_SHARES = "FL_PRIVACY_MEMORY_SHARES"
"""Environment variable: how many processes like this one have to share the free memory."""


def memory_shares() -> int:
    """What `MEMORY_SHARES` says; alone, 1."""
    return max(1, int(os.environ.get(MEMORY_SHARES, "1")))


Process = tuple[int, int, str]
"""Its id, its parent's, and its environment."""


def processes() -> list[Process]:
    """The living ones; of other users' the environment is not seen."""
    return list(_linux_processes() if Path("/proc/self/environ").exists() else _ps_processes())


def marked(mark: str, among: Iterable[Process] | None = None) -> set[int]:
    """Ids of the living processes whose environment holds ``mark``, and of their children.

    Looks at all there are unless told ``among`` which. The calling process is never one of them.
    """
    rows = processes() if among is None else list(among)
    found = {pid for pid, _, environment in rows if mark in environment}
    grown = True
    while grown:
        children = {pid for pid, parent, _ in rows if parent in found} - found
        found |= children
        grown = bool(children)
    return found - {os.getpid()}


def end(mark: str, *, patience: float = 3.0) -> set[int]:
    """End all marked processes: SIGTERM at once, SIGKILL after ``patience`` seconds.

    Returns the ids of those that outlived even that (none, but for a stuck kernel call).
    """
    asked: set[int] = set()
    start = time.monotonic()
    while alive := marked(mark):
        waited = time.monotonic() - start
        if waited > patience + 5.0:
            return alive
        for pid in alive if waited > patience else alive - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if waited > patience else signal.SIGTERM)
        asked |= alive
        time.sleep(0.1)
    return set()


def _linux_processes() -> Iterator[Process]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                environment = (folder / "environ").read_bytes().decode(errors="replace")
                yield int(folder.name), int(parent), environment


def _ps_processes() -> Iterator[Process]:
    listing = subprocess.run(
        ["ps", "-axEww", "-o", "pid=,ppid=,stat=,command="],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in listing.stdout.splitlines():
        pid, parent, state, *rest = line.split(None, 3)
        if not state.startswith("Z"):
            yield int(pid), int(parent), "".join(rest)

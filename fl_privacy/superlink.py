"""A SuperLink of one's own: free port, private folder, and an end in every case."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fl_privacy.processes import end

CONNECTION = "private"
STARTUP_SECONDS = 60.0
_MARK = "FL_PRIVACY_SIMULATION"
_Handler = Callable[[int, FrameType | None], None] | signal.Handlers
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SimulationError(RuntimeError):
    """The simulation could not start, or its run failed."""


@dataclass(frozen=True)
class SuperLink:
    """Where a running SuperLink lives, and the environment in which ``flwr`` reaches it."""

    home: Path
    environment: dict[str, str]

    @property
    def work(self) -> Path:
        """A neutral working directory: Ray workers import from it before anything else."""
        return self.home / "work"

    @property
    def log(self) -> Path:
        """What the SuperLink itself says."""
        return self.home / "superlink.log"


@contextmanager
def private_superlink(stopping: Callable[[], None] = lambda: None) -> Iterator[SuperLink]:
    """Start a SuperLink in simulation mode; end it and all its helpers on the way out.

    SIGTERM and SIGHUP raise `SystemExit` inside the block, SIGINT `KeyboardInterrupt`; then
    ``stopping`` is called before the end, which takes seconds.

    Raises:
        SimulationError: it did not start; the message holds what it said.
    """
    mark = secrets.token_hex(16)
    with short_folder() as home, signals_raise():
        link = SuperLink(home, flower_environment(home) | {_MARK: mark})
        try:
            _start(link)
            yield link
        except (KeyboardInterrupt, SystemExit):
            stopping()
            raise
        finally:
            with signals_ignored():
                end(f"{_MARK}={mark}")


def _start(link: SuperLink) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    link.work.mkdir()
    (link.home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with link.log.open("wb") as log:
        process = subprocess.Popen(
            [
                *("flower-superlink", "--insecure", "--simulation"),
                *("--host", "127.0.0.1", "--port", port),
            ],
            env=link.environment,
            cwd=link.work,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _await_health(f"http://127.0.0.1:{port}/health", process, link.log)


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Whether a SuperLink answers at the URL, without any proxy."""
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=1):
            return True
    except OSError:
        return False


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if answers(url):
            return
        time.sleep(0.05)
    how = "did not answer" if process.poll() is None else f"exited with {process.returncode}"
    raise SimulationError(f"Flower's SuperLink {how}; it said:\n{log.read_text()[-2000:]}")


def flower_environment(home: Path) -> dict[str, str]:
    """In which a process of Flower finds our commands, its folder, and no reason to call home."""
    local = "127.0.0.1,localhost"
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), local])),
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), local])),
        "PYTHONUNBUFFERED": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder for a while, of a short path: Ray's sockets below it may have 107 bytes."""
    parent = min(tempfile.gettempdir(), "/tmp", key=len)
    folder = Path(tempfile.mkdtemp(prefix="flp-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP (unless nohup ignores it) raise, so that all is ended.

    SIGINT too: Python leaves it ignored in the background jobs of a shell script.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers: dict[signal.Signals, _Handler] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: leave,
    }
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = leave
    with _handlers(handlers):
        yield


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Let a second Ctrl-C not interrupt the clean-up that the first one started."""
    with _handlers(dict.fromkeys(_SIGNALS, signal.SIG_IGN)):
        yield


@contextmanager
def _handlers(handlers: Mapping[signal.Signals, _Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A Flower simulation on a SuperLink of its own: ``flwr run --stream`` without its traps.

Nothing outlives the call: not after success, not after failure, not after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fl_privacy.code_digest import PACKAGES
from fl_privacy.component import VERSION
from fl_privacy.preflight import check_ray_address, check_resources, prepare
from fl_privacy.printable import plain
from fl_privacy.run_folder import RunFolder, open_private, writable_run_folder
from fl_privacy.settings import RunSettings, Scalar, parse_settings
from fl_privacy.superlink import CONNECTION, SimulationError, SuperLink, private_superlink

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_ROUND = re.compile(r"\[ROUND (\d+)/(\d+)\]")
_STARTED = re.compile(r"started run (\d+)")
_CRASH = re.compile(r"^ERROR.*An exception occur+ed ?!! (.+)")
_RAY_TIMEOUT = re.compile(r"node timed out during startup|GCS (may have|has) become overloaded")
_RAY_ERROR = re.compile(r"<class 'ray\.exceptions.*?Message: (.*?)'>", re.DOTALL)

RAY_TIMEOUT = "Ray did not start in time: the machine is overloaded; try again"


class RayTimeoutError(SimulationError):
    """Ray gave up on its own start, which another attempt may survive."""


def simulate(
    config: Mapping[str, Scalar],
    *,
    out: Path,
    app: Path | None = None,
    clients: int = 10,
    client_cpus: int = 1,
    client_gpus: float = 0.0,
    total_cpus: int | None = None,
    total_gpus: int | None = None,
    stream: Callable[[str], None] = lambda line: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Run a Flower app (by default this one) in Flower's simulation engine, to its end.

    ``config`` overrides keys of the app's run config; ``out`` becomes its ``out-dir``.
    Each client gets ``client_cpus`` cores and ``client_gpus`` (a fraction is fine) of the
    ``total_cpus`` and ``total_gpus`` that Ray may use (None: all it finds). ``stream`` gets
    each line of Flower's log, which also goes to ``simulation.log`` in the run folder;
    ``stopping`` is called when a signal ends the run, which takes seconds.

    Raises:
        ComponentError, DatasetError: a setting is wrong, settings do not go together, or a
            client wants more than there is.
        RunFolderError, RecordingError: ``out`` cannot be used, or not resumed with ``config``.
        SimulationError: the run did not complete; the message says why.
        RayTimeoutError: Ray did not start in time, as on an overloaded machine; try again.
    """
    check_ray_address(os.environ.get("RAY_ADDRESS", ""))
    if app is None:
        config = {"min-clients": clients, **config}
        prepare(parse_settings(config), clients, RunFolder(out))
    check_resources(client_cpus, client_gpus, total_cpus, total_gpus)
    folder = writable_run_folder(out, resume=bool(config.get("resume", False)))
    resources = {
        "num-supernodes": clients,
        "client-resources-num-cpus": client_cpus,
        "client-resources-num-gpus": client_gpus,
        "init-args-num-cpus": total_cpus,
        "init-args-num-gpus": total_gpus,
    }
    with private_superlink(stopping) as link:
        source = app or assemble_app(link.home / "app")
        command = _run_command(link, source, {**config, "out-dir": str(out)}, resources)
        run_id, crash = follow(link, command, folder.log, stream)
        require_completed(link, run_id, crash, folder.log)


def round_of(line: str) -> tuple[int, int] | None:
    """The round that a line of Flower's log announces, and how many there will be."""
    match = _ROUND.search(line)
    return (int(match[1]), int(match[2])) if match else None


def assemble_app(folder: Path) -> Path:
    """Write a Flower app made of the packages that run right now into ``folder``."""
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SimulationError(f"package {package} is not installed: pip install fl-privacy")
        shutil.copytree(
            spec.submodule_search_locations[0],
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    config = toml(RunSettings().model_dump(by_alias=True))
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "fl-privacy"\nversion = "{VERSION}"\nlicense = "Apache-2.0"\n'
        f'description = "fl-privacy"\ndependencies = []\n'
        f'[tool.flwr.app]\npublisher = "fl-privacy"\n'
        f'[tool.flwr.app.components]\nserverapp = "fl_privacy.server_app:app"\n'
        f'clientapp = "fl_privacy.client_app:app"\n[tool.flwr.app.config]\n{config}'
    )
    return folder


def _run_command(
    link: SuperLink,
    app: Path,
    settings: Mapping[str, Scalar],
    resources: Mapping[str, Scalar | None],
) -> list[str]:
    return [
        *("flwr", "run", str(app), CONNECTION, "--stream"),
        *("--run-config", str(write_toml(link.home / "run.toml", settings))),
        *("--federation-config", str(write_toml(link.home / "size.toml", resources))),
    ]


def follow(
    link: SuperLink,
    command: list[str],
    log_file: Path,
    stream: Callable[[str], None],
    run_id: str | None = None,
    on_start: Callable[[str], None] = lambda run_id: None,
) -> tuple[str, str]:
    """Start a run and pass its log on until it ends; returns its id and why it crashed.

    With a ``run_id`` the command shows the log of that run, which was started before; else
    ``on_start`` gets the id as soon as there is one.
    """
    crash = ""
    said: deque[str] = deque(maxlen=20)
    with _process(link, command) as process, open_private(log_file) as log:
        for raw in process.stdout or ():
            line = plain(_COLORS.sub("", raw)).rstrip()
            said.append(line)
            with suppress(OSError):  # a full disk ends no run
                os.write(log.fileno(), f"{line}\n".encode(errors="replace"))
            if run_id is None and (started := _STARTED.search(line)):
                run_id = started[1]
                on_start(run_id)
            if _RAY_TIMEOUT.search(line):
                crash = RAY_TIMEOUT
            elif (crashed := _CRASH.match(line)) and crash != RAY_TIMEOUT:
                crash = crashed[1]
            stream(line)
    if run_id is None:
        raise SimulationError("Flower did not accept the run; it said:\n" + "\n".join(said))
    return run_id, crash


@contextmanager
def _process(link: SuperLink, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A child that ends with the block: left to itself, `Popen` would wait for it for ever."""
    with subprocess.Popen(
        command,
        env=link.environment,
        cwd=link.work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def require_completed(link: SuperLink, run_id: str, crash: str, log_file: Path) -> None:
    """Ask how the run ended: ``flwr run`` itself exits with 0 even when it failed."""
    with _process(link, ["flwr", "list", "--run-id", run_id, "--format", "json"]) as process:
        answer, _ = process.communicate()
    try:
        run: dict[str, Any] = json.loads(answer)["runs"][0]
    except (ValueError, LookupError):
        raise SimulationError(
            f"cannot tell how the run ended, its SuperLink said: {answer.strip()}; log: {log_file}"
        ) from None
    if run["status"] != "finished:completed":
        details = crash or _plain(run["status-details"])
        kind = RayTimeoutError if crash == RAY_TIMEOUT else SimulationError
        raise kind(f"{details} (the run {run['status']}; log: {log_file})")


def _plain(details: str) -> str:
    """Why a run failed, each reason once and without the tracebacks that Ray puts around it."""
    text = details.removeprefix("Simulation failed with exception: ")
    reasons = dict.fromkeys(_RAY_ERROR.findall(text))
    return _RAY_ERROR.split(text)[0] + "; ".join(reasons)


def toml(values: Mapping[str, Scalar | None]) -> str:
    """Flat scalars as TOML lines (None left out); JSON's scalars are TOML's too."""
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None
    )


def write_toml(path: Path, values: Mapping[str, Scalar | None]) -> Path:
    """A file, because ``key=value`` pairs on Flower's command line cannot hold every text."""
    path.write_text(toml(values), encoding="utf-8")
    return path

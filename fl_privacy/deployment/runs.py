"""Submit a run to a deployment, follow it, and go on with one that was cut off."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fl_privacy.deployment.control import CONNECTION, ask, control
from fl_privacy.deployment.local import living, outdated
from fl_privacy.deployment.topology import (
    Deployment,
    DeploymentError,
    DeploymentFailure,
    check_run,
)
from fl_privacy.history import read_lines
from fl_privacy.preflight import prepare
from fl_privacy.recording_store import write_atomically
from fl_privacy.run_folder import RunFolder, private_folder, writable_run_folder
from fl_privacy.settings import Scalar, parse_settings
from fl_privacy.simulation import assemble_app, follow, require_completed, write_toml

FEWER = "num-server-rounds"
FINISHED = "finished"


def run(
    deployment: Deployment,
    name: str,
    changes: Mapping[str, Scalar],
    *,
    audit: bool = False,
    resume: bool = False,
    stream: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run the app on the deployment's nodes to its end; returns the run folder.

    ``changes`` override the table ``[run]``. A run to ``resume`` has as many rounds in all as
    they say. One that is still going on, as after a SuperLink that came back, is followed; else
    it takes the rounds that its last attempt left.

    Raises:
        ComponentError, RunFolderError, RecordingError: settings that do not go together, or
            with the recording to resume.
        DeploymentError: not a name of a folder, or nothing is left to run.
        DeploymentFailure, SimulationError: the SuperLink does not answer, or the run failed.
    """
    check_run(changes)
    folder, link = run_folder(deployment, name), control(deployment)
    config: dict[str, Scalar] = {"min-clients": len(deployment.nodes), "record-failures": "go-on"}
    config |= {**deployment.run, **changes, "audit": audit}
    total = parse_settings(config).num_server_rounds
    if found := list(outdated(deployment, living(deployment))):
        raise DeploymentError("; ".join(found))
    if int(config["min-clients"] or 0) > len(deployment.nodes):
        raise DeploymentError(
            f"min-clients = {config['min-clients']}, but the deployment has "
            f"{len(deployment.nodes)} nodes: every round would wait for more"
        )
    if resume and (running := going_on(deployment, name)):
        follow(link, ["flwr", "log", running, CONNECTION], folder.log, stream, running)
        require_ended(deployment, running)
        if rounds_done(folder) >= total:
            return folder.path
    if resume:
        config |= {"resume": True, FEWER: rounds_left(folder, total)}
    config["out-dir"] = str(folder.path)
    own_data = any(node.dataset for node in deployment.nodes)
    prepare(parse_settings(config), len(deployment.nodes), folder, own_data=own_data)
    ask(deployment, "supernode", "list")  # so that an absent SuperLink is told at once
    writable_run_folder(folder.path, resume=resume)
    with tempfile.TemporaryDirectory(prefix="flp-") as temporary:
        app = assemble_app(Path(temporary) / "app")
        settings = write_toml(Path(temporary) / "run.toml", config)
        command = ["flwr", "run", str(app), CONNECTION, "--stream", "--run-config", str(settings)]
        run_id, crash = follow(
            link, command, folder.log, stream, on_start=partial(_remember, deployment, name)
        )
    require_ended(deployment, run_id)
    require_completed(link, run_id, crash, folder.log)
    return folder.path


def stop(deployment: Deployment, name: str) -> bool:
    """End a run that is going on; returns whether it was. What it recorded stays.

    Raises:
        DeploymentError, DeploymentFailure: no name of a run, or the SuperLink does not answer.
    """
    if not run_folder(deployment, name).path.exists():
        raise DeploymentError(f"no run {name} in {deployment.recordings}")
    if running := going_on(deployment, name):
        ask(deployment, "stop", running)
    return running is not None


def going_on(deployment: Deployment, name: str) -> str | None:
    """Id of the run of this name, if the SuperLink says that it has not finished.

    By what was kept when it was submitted: a log holds what clients say.
    """
    kept = deployment.state / "runs" / name
    if not kept.exists():
        return None
    run_id = kept.read_text()
    known = {str(one["run-id"]): str(one["status"]) for one in runs(deployment)}
    return None if known.get(run_id, FINISHED).startswith(FINISHED) else run_id


def names(deployment: Deployment) -> dict[str, str]:
    """Name of each run, by its id."""
    kept = (deployment.state / "runs").glob("*")
    return {path.read_text(): path.name for path in kept if path.is_file()}


def _remember(deployment: Deployment, name: str, run_id: str) -> None:
    kept = deployment.state / "runs" / name
    private_folder(kept.parent)
    write_atomically([(kept, run_id.encode())])


def require_ended(deployment: Deployment, run_id: str) -> None:
    """See to it that a run that was followed has ended.

    Raises:
        DeploymentFailure: it goes on, or nobody knows, as the SuperLink is gone.
    """
    try:
        status = str(ask(deployment, "list", "--run-id", run_id)["runs"][0]["status"])
    except DeploymentFailure:
        status = "unknown, as the SuperLink does not answer"
    if not status.startswith(FINISHED):
        raise DeploymentFailure(
            f"run {run_id} was followed no longer; its state is {status}. Once fl-privacy deploy "
            f"up has brought back what ended, the same command with --resume goes on"
        )


def run_folder(deployment: Deployment, name: str) -> RunFolder:
    """Where the server keeps a run.

    Raises:
        DeploymentError: the name is not one of a single folder.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise DeploymentError(f"expected a name for the run such as first, got {name!r}")
    return RunFolder(deployment.recordings / name)


def rounds_left(folder: RunFolder, total: int) -> int:
    """How many of ``total`` rounds all attempts of a run together have left.

    Raises:
        DeploymentError: none, or there is no such run.
    """
    if not folder.manifest.exists():
        raise DeploymentError(f"nothing to resume in {folder.path}: leave --resume out")
    left = total - rounds_done(folder)
    if left <= 0:
        raise DeploymentError(
            f"{folder.path} has its {total} rounds; for more: --set {FEWER}={total + 10}"
        )
    return left


def rounds_done(folder: RunFolder) -> int:
    """Rounds whose aggregate was kept, over all attempts: each goes on from the last of these."""
    last: dict[int, int] = {}
    for line in read_lines(folder.history):
        if line.get("kept", True):
            last[line["attempt"]] = max(last.get(line["attempt"], 0), line["round"])
    return sum(last.values())


def runs(deployment: Deployment) -> list[dict[str, Any]]:
    """What the SuperLink knows of runs, the newest first."""
    found: list[dict[str, Any]] = ask(deployment, "list")["runs"]
    return found

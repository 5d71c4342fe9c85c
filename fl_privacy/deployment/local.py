"""Bring the processes of a deployment up and down, and see which of them live.

Each process carries the deployment's token and its role in its environment, and so do its
children: that is how they are found again, by another command too, and how they are ended.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_privacy.deployment.roles import LOOPBACK, Role, node_config_of, roles, secret_of
from fl_privacy.deployment.topology import Deployment, DeploymentError, DeploymentFailure
from fl_privacy.printable import plain
from fl_privacy.processes import end, marked
from fl_privacy.recording_store import write_atomically
from fl_privacy.run_folder import open_private, private_folder
from fl_privacy.simulation import toml
from fl_privacy.superlink import SuperLink, answers, flower_environment
from fl_privacy.tls import CA, add_nodes, write_certificates
from fl_privacy.tls_check import problems as certificate_problems

CONNECTION = "deployed"
START_SECONDS = 90.0
RETRY_SECONDS = 5.0
SAID, SAID_BYTES = 12, 4_000
"""Lines of its log that tell why a process ended, and bytes in which they are looked for."""

_MARK = "FL_PRIVACY_DEPLOYMENT"
REFUSED = "code: 2004"
"""To an unknown key, and for a minute to one of a node that was killed: it counts as online."""

KNOWN = {
    "code: 2001": "the SuperNode has no key",
    REFUSED: "its key is not registered with the SuperLink, or no longer",
    "CERTIFICATE_VERIFY_FAILED": "it does not trust the SuperLink's certificate",
    "Socket closed": "the SuperLink speaks TLS, and it does not",
    "Invalid timestamp": "its clock differs from the SuperLink's by more than five seconds",
}
_JOINED = "SuperNode ID:"
"""What a SuperNode says when the SuperLink has let it in."""


@dataclass(frozen=True)
class Living:
    """A role, and the ids of the processes that fill it, children included."""

    role: Role
    pids: frozenset[int]


def up(deployment: Deployment, tell: Callable[[str], None] = lambda step: None) -> None:
    """Start every process that does not run, register the nodes, and wait until all are online.

    ``tell`` hears what is being waited for.

    Raises:
        DeploymentError: certificates, keys or ports are not as they should be.
        DeploymentFailure: a process ended or did not come up; what does run goes on.
    """
    _prepare(deployment)
    dead = [one.role for one in living(deployment) if not one.pids]
    if found := [*_unready(deployment), *taken_ports(dead)]:
        raise DeploymentError("; ".join(found))
    by_name = {role.name: role for role in dead}
    link, nodes = by_name.pop("superlink", None), range(len(deployment.nodes))
    tell("starting the SuperLink")
    if link:
        _start(deployment, link)
    _await(deployment, lambda: _healthy(deployment), "the SuperLink to answer")
    tell("registering the nodes")
    for node in nodes:
        register(deployment, node)
    said = {role: _said(deployment, role) for role in by_name.values()}
    for role in by_name.values():
        _start(deployment, role)
    tell("waiting for the SuperNodes")
    for role in said:
        if role.name.startswith("supernode"):
            _admit(deployment, role, said[role])
    _await(deployment, lambda: online(deployment) >= len(nodes), "all SuperNodes to be online")


def down(deployment: Deployment) -> int:
    """End every process of a deployment; returns how many there were.

    Raises:
        DeploymentFailure: some could not be ended.
    """
    if not (token := _token(deployment)):
        return 0
    mark = f"{_MARK}={token}"
    there = len(marked(mark))
    if left := end(mark, patience=10.0):
        raise DeploymentFailure(f"processes {sorted(left)} could not be ended")
    return there


def living(deployment: Deployment) -> list[Living]:
    """Every role with the processes that fill it now; none of a deployment that was never up."""
    there = _token(deployment)
    return [
        Living(role, frozenset(marked(_marking(deployment, role)) if there else ()))
        for role in roles(deployment)
    ]


def taken_ports(wanted: list[Role]) -> Iterator[str]:
    """A sentence for each address of roles that something else listens on."""
    for role in wanted:
        for address, port in role.listens:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError as error:
                    yield (
                        f"{role.name} cannot listen on {address}:{port} ({error.strerror}): end "
                        f"what does, or choose another port in the table [ports]"
                    )


def log_of(deployment: Deployment, role: Role) -> Path:
    """What a process says."""
    return deployment.logs / f"{role.name}.log"


def control(deployment: Deployment) -> SuperLink:
    """The environment in which ``flwr`` reaches the SuperLink of a deployment.

    Raises:
        DeploymentFailure: there is none, as the deployment was never up.
    """
    if not deployment.state.is_dir():
        raise DeploymentFailure("the deployment was never up: fl-privacy deploy up")
    home = deployment.state / "flwr" / "control"
    private_folder(home / "work")
    (home / "config.toml").write_text(
        f"[superlink]\ndefault = {json.dumps(CONNECTION)}\n[superlink.{CONNECTION}]\n"
        f"address = {json.dumps(f'{LOOPBACK}:{deployment.ports.control}')}\n"
        f"root-certificates = {json.dumps(str(deployment.certificates / CA) + '.crt')}\n"
    )
    return SuperLink(home, flower_environment(home))


def ask(deployment: Deployment, *command: str) -> dict[str, Any]:
    """What a ``flwr`` command answers in JSON.

    Raises:
        DeploymentFailure: the SuperLink does not answer, or refuses.
    """
    link = control(deployment)
    done = subprocess.run(
        ["flwr", *command, CONNECTION, "--format", "json"],
        env=link.environment,
        cwd=link.work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    answer: dict[str, Any] = {}
    with suppress(ValueError):
        answer = json.loads(done.stdout)
    if not answer.get("success"):
        said = answer.get("error-message") or done.stderr or done.stdout
        raise DeploymentFailure(f"flwr {' '.join(command)}: {plain(str(said)).strip()}")
    return answer


def register(deployment: Deployment, node: int) -> None:
    """Let a node's key in, once."""
    public = deployment.certificates / f"node-{node}.pub"
    kept = deployment.state / f"node-{node}.registered"
    if kept.exists() and kept.read_bytes() == public.read_bytes():
        return
    try:
        ask(deployment, "supernode", "register", str(public))
    except DeploymentFailure as failure:
        if "already in use" not in str(failure):
            raise
    write_atomically([(kept, public.read_bytes())])


def online(deployment: Deployment) -> int:
    """How many SuperNodes are online."""
    nodes = ask(deployment, "supernode", "list")["nodes"]
    return sum(node["status"] == "online" for node in nodes)


def _prepare(deployment: Deployment) -> None:
    """Folders for the owner alone, secrets, node configs; certificates if there are none."""
    nodes = range(len(deployment.nodes))
    own = [deployment.node_folder(node) for node in nodes]
    for folder in (
        *(deployment.path, deployment.state, deployment.logs, deployment.recordings),
        *(inner for node in own for inner in (node, node / "runs", node / "state")),
    ):
        private_folder(folder)
    if not deployment.certificates.exists():
        write_certificates(deployment.certificates, deployment.names, nodes=len(nodes))
    new = [n for n in nodes if not any(deployment.certificates.glob(f"*-{n}.*"))]
    if new:
        add_nodes(deployment.certificates, new)
    if not _token(deployment):
        write_atomically([(_token_file(deployment), secrets.token_hex(16).encode())])
    for group in ("server", *(f"node-{node}" for node in nodes)):
        if not (secret := secret_of(deployment, group)).exists():
            write_atomically([(secret, secrets.token_hex(32).encode())])
    for node in nodes:
        told = toml(deployment.node_config(node)).encode()
        write_atomically([(node_config_of(deployment, node), told)])


def _unready(deployment: Deployment) -> list[str]:
    """What is wrong with certificates and keys, and commands that are missing."""
    found = certificate_problems(
        deployment.certificates, deployment.names, nodes=len(deployment.nodes)
    )
    path = flower_environment(deployment.state)["PATH"]
    if shutil.which("flower-superlink", path=path) is None:
        found.append("flower-superlink is not installed here: pip install fl-privacy")
    return found


def _start(deployment: Deployment, role: Role) -> None:
    home = deployment.state / "flwr" / role.name
    work = private_folder(home / "work")
    with open_private(log_of(deployment, role)) as log:
        subprocess.Popen(
            role.command,
            env=flower_environment(home) | dict([_marking(deployment, role).split("=", 1)]),
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )


def _admit(deployment: Deployment, role: Role, since: int) -> None:
    """Wait until a SuperNode is let in; start it again as long as it may count as online still.

    Raises:
        DeploymentFailure: it ended for another reason, or was not let in for too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while _JOINED not in (text := _log(deployment, role, since)):
        late = time.monotonic() > deadline
        if not marked(_marking(deployment, role)):
            if late or REFUSED not in text:
                raise DeploymentFailure(why_ended(deployment, role))
            time.sleep(RETRY_SECONDS)
            since = _said(deployment, role)
            _start(deployment, role)
        elif late:
            raise DeploymentFailure(f"{role.name} was not let in: {log_of(deployment, role)}")
        time.sleep(0.2)


def _await(deployment: Deployment, ready: Callable[[], bool], what: str) -> None:
    """Wait until it is so.

    Raises:
        DeploymentFailure: a process ended meanwhile, or it took too long.
    """
    started = {one.role.name for one in living(deployment) if one.pids}
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        for one in living(deployment):
            if one.role.name in started and not one.pids:
                raise DeploymentFailure(why_ended(deployment, one.role))
        if time.monotonic() > deadline:
            raise DeploymentFailure(
                f"waited {START_SECONDS:.0f} s for {what}; logs: {deployment.logs}"
            )
        time.sleep(0.2)


def why_ended(deployment: Deployment, role: Role) -> str:
    """What a process that ended said last, in words where its reason is known."""
    log = log_of(deployment, role)
    said = _log(deployment, role, max(0, _said(deployment, role) - SAID_BYTES)).splitlines()
    known = [why for text, why in KNOWN.items() if any(text in line for line in said)]
    said = said[-SAID:]
    return f"{role.name} ended{': ' + known[0] if known else ''}; {log} ends with:\n" + "\n".join(
        said
    )


def _healthy(deployment: Deployment) -> bool:
    context = ssl.create_default_context(cafile=f"{deployment.certificates / CA}.crt")
    return answers(f"https://{LOOPBACK}:{deployment.ports.control}/health", context)


def _said(deployment: Deployment, role: Role) -> int:
    """Size of a role's log."""
    log = log_of(deployment, role)
    return log.stat().st_size if log.exists() else 0


def _log(deployment: Deployment, role: Role, start: int) -> str:
    """A role's log from a byte on."""
    with log_of(deployment, role).open("rb") as log:
        log.seek(start)
        return plain(log.read().decode(errors="replace"))


def _token_file(deployment: Deployment) -> Path:
    return deployment.state / "token"


def _token(deployment: Deployment) -> str:
    """Of this deployment and no other; empty if it was never up."""
    kept = _token_file(deployment)
    return kept.read_text() if kept.exists() else ""


def _marking(deployment: Deployment, role: Role) -> str:
    return f"{_MARK}={_token(deployment)}:{role.name};"

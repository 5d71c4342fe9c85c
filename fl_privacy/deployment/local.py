"""Bring the processes of a deployment up and down, and see which of them live.

Each process carries the deployment's token and its role in its environment, and so do its
children: that is how they are found again, by another command too, and how they are ended.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fl_privacy import component
from fl_privacy.deployment.control import START_SECONDS
from fl_privacy.deployment.members import former, online, register, spent_keys, unregister
from fl_privacy.deployment.roles import LOOPBACK, Role, roles, secret_of
from fl_privacy.deployment.topology import Deployment, DeploymentError, DeploymentFailure
from fl_privacy.printable import plain
from fl_privacy.processes import end, marked, processes
from fl_privacy.recording_format import digest
from fl_privacy.recording_store import write_atomically
from fl_privacy.run_folder import open_private, private_folder
from fl_privacy.superlink import answers, flower_environment
from fl_privacy.tls import CA, add_nodes, write_certificates
from fl_privacy.tls_check import problems as certificate_problems

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
    "SuperNode terminated gracefully": (
        "it was stopped, or its clock is more than 5 s ahead of the SuperLink's or 305 s behind"
    ),
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

    Nodes that are no longer in the file end, and their keys let nobody in. ``tell`` hears what
    is being waited for.

    Raises:
        DeploymentError: certificates, keys or ports are not as they should be, a process runs
            with what was changed since, or another command brings the deployment up.
        DeploymentFailure: a process ended or did not come up; what does run goes on.
    """
    _prepare(deployment)
    with _alone(deployment):
        _up(deployment, tell)


def _up(deployment: Deployment, tell: Callable[[str], None]) -> None:
    found = living(deployment)
    dead = [one.role for one in found if not one.pids]
    made = [*_unready(deployment), *unmade(deployment), *spent_keys(deployment)]
    if wrong := [*made, *outdated(deployment, found), *taken_ports(dead)]:
        raise DeploymentError("; ".join(wrong))
    by_name = {role.name: role for role in dead}
    link, nodes = by_name.pop("superlink", None), range(len(deployment.nodes))
    tell("starting the SuperLink")
    if link:
        _start(deployment, link)
    _await(deployment, lambda: _healthy(deployment), "the SuperLink to answer")
    tell("registering the nodes")
    for node in former(deployment):
        for name in (f"supernode-{node}", f"clientapp-{node}"):
            _end(_marking(deployment, name))
        unregister(deployment, node)
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
    _end(mark)
    return there


def living(deployment: Deployment) -> list[Living]:
    """Every role with the processes that fill it now; none of a deployment that was never up."""
    there = processes() if _token(deployment) else []
    return [
        Living(role, frozenset(marked(_marking(deployment, role.name), there)))
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


def _prepare(deployment: Deployment) -> None:
    """Folders for the owner alone, secrets; certificates if there are none."""
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


def _unready(deployment: Deployment) -> list[str]:
    """What is wrong with certificates and keys, and commands that are missing."""
    found = certificate_problems(
        deployment.certificates, deployment.names, nodes=len(deployment.nodes)
    )
    path = flower_environment(deployment.state)["PATH"]
    if shutil.which("flower-superlink", path=path) is None:
        found.append("flower-superlink is not installed here: pip install fl-privacy")
    return found


@contextmanager
def _alone(deployment: Deployment) -> Iterator[None]:
    """No second command starts the same processes meanwhile."""
    descriptor = os.open(deployment.state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DeploymentError(
            f"another command is bringing up {deployment.path}; wait for it to end"
        ) from None
    finally:
        os.close(descriptor)


def outdated(deployment: Deployment, found: list[Living]) -> Iterator[str]:
    """A sentence for each process that was started with other settings, keys or certificates."""
    for one in found:
        kept = _terms_file(deployment, one.role)
        if one.pids and kept.exists() and kept.read_text() != _terms(one.role):
            yield (
                f"{one.role.name} runs with what has been changed since (settings, ports, keys or "
                f"certificates): fl-privacy deploy down, then up"
            )


def unmade(deployment: Deployment) -> Iterator[str]:
    """A sentence for each defense or dataset of a node that cannot be made."""
    for number, node in enumerate(deployment.nodes):
        try:
            if node.dataset:
                component.create("datasets", node.dataset)
            component.create_all("defenses", str(node.settings.get("client-defense", "")))
        except ValueError as error:
            yield f"node {number}: {error}"


def strangers(deployment: Deployment, found: list[Living]) -> int:
    """How many processes of the deployment are not among those of its file's roles."""
    if not (token := _token(deployment)):
        return 0
    return len(marked(f"{_MARK}={token}:").difference(*(one.pids for one in found)))


def _terms_file(deployment: Deployment, role: Role) -> Path:
    return deployment.state / f"{role.name}.started"


def _terms(role: Role) -> str:
    """A digest of a role's command and of every file that it reads when it starts."""
    own, text = role.reads or (Path(), "")
    named = (Path(option.partition("=")[2]) for option in role.command if "=" in option)
    files = [p.read_bytes() for p in named if p.is_file() and p != own and p.suffix != ".db"]
    return digest(b"\0".join([*map(str.encode, [*role.command, text]), *files]))


def _end(mark: str) -> None:
    if left := end(mark, patience=10.0):
        raise DeploymentFailure(f"processes {sorted(left)} could not be ended")


def _start(deployment: Deployment, role: Role) -> None:
    told = [role.reads] if role.reads else []
    told.append((_terms_file(deployment, role), _terms(role)))
    write_atomically([(path, text.encode()) for path, text in told])
    home = deployment.state / "flwr" / role.name
    work = private_folder(home / "work")
    with open_private(log_of(deployment, role)) as log:
        subprocess.Popen(
            role.command,
            env=flower_environment(home) | dict([_marking(deployment, role.name).split("=", 1)]),
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
        if not marked(_marking(deployment, role.name)):
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


def _marking(deployment: Deployment, role: str) -> str:
    """What the environment of a role's processes holds."""
    return f"{_MARK}={_token(deployment)}:{role};"

"""The processes of a deployment: who runs with which command, and who speaks to whom.

Apps run apart from keys: a SuperLink and each SuperNode hold theirs, and a SuperExec beside each
starts the apps. Every link has TLS; a secret of their own lets a SuperExec in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fl_privacy.deployment.topology import Deployment
from fl_privacy.simulation import toml
from fl_privacy.tls import CA, SERVER

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Role:
    """One process: its name, its command, and the addresses and ports on which it listens.

    ``reads`` is a file that is written for it when it starts, and its text.
    """

    name: str
    command: tuple[str, ...]
    listens: tuple[tuple[str, int], ...] = ()
    reads: tuple[Path, str] | None = None


def roles(deployment: Deployment) -> tuple[Role, ...]:
    """All processes, in the order in which they start."""
    nodes = range(len(deployment.nodes))
    return (
        _superlink(deployment),
        _superexec(deployment, "serverapp", deployment.ports.control, "server"),
        *(_supernode(deployment, node) for node in nodes),
        *(
            _superexec(deployment, f"clientapp-{node}", port, f"node-{node}")
            for node, port in zip(nodes, deployment.runtime_ports, strict=True)
        ),
    )


def secret_of(deployment: Deployment, group: str) -> Path:
    """File of what a SuperExec of a group (``server``, ``node-0``, ...) proves itself by."""
    return deployment.state / f"{group}.secret"


def node_config_of(deployment: Deployment, node: int) -> Path:
    """File of what a SuperNode is told."""
    return deployment.state / f"node-{node}.toml"


def _superlink(deployment: Deployment) -> Role:
    certs, ports = deployment.certificates, deployment.ports
    return Role(
        "superlink",
        (
            "flower-superlink",
            *_served(certs, SERVER),
            "--enable-supernode-auth",
            "--isolation=process",
            "--disable-runtime-dependency-installation",
            f"--superexec-auth-secret-file={secret_of(deployment, 'server')}",
            f"--host={LOOPBACK}",
            f"--port={ports.control}",
            "--fleet-api-type=grpc-rere",
            f"--fleet-api-address={deployment.listen}:{ports.fleet}",
            f"--database={deployment.state / 'superlink.db'}",
        ),
        ((LOOPBACK, ports.control), (str(deployment.listen), ports.fleet)),
    )


def _supernode(deployment: Deployment, node: int) -> Role:
    certs, port = deployment.certificates, deployment.runtime_ports[node]
    superlink = deployment.nodes[node].superlink or f"{LOOPBACK}:{deployment.ports.fleet}"
    return Role(
        f"supernode-{node}",
        (
            "flower-supernode",
            f"--superlink={superlink}",
            f"--root-certificates={certs / CA}.crt",
            f"--auth-supernode-private-key={certs}/node-{node}.key",
            f"--node-config={node_config_of(deployment, node)}",
            "--isolation=process",
            f"--superexec-auth-secret-file={secret_of(deployment, f'node-{node}')}",
            f"--host={LOOPBACK}",
            f"--port={port}",
            *_served(certs, f"runtime-{node}"),
        ),
        ((LOOPBACK, port),),
        (node_config_of(deployment, node), toml(deployment.node_config(node))),
    )


def _superexec(deployment: Deployment, name: str, port: int, group: str) -> Role:
    return Role(
        name,
        (
            "flower-superexec",
            f"--runtime-api-address={LOOPBACK}:{port}",
            f"--root-certificates={deployment.certificates / CA}.crt",
            f"--superexec-auth-secret-file={secret_of(deployment, group)}",
        ),
    )


def _served(certs: Path, name: str) -> tuple[str, ...]:
    return (
        f"--ssl-ca-certfile={certs / CA}.crt",
        f"--ssl-certfile={certs / name}.crt",
        f"--ssl-keyfile={certs / name}.key",
    )

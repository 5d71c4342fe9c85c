"""Which SuperNodes the SuperLink lets in: those of the deployment file, by their keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from fl_privacy.deployment.control import ask
from fl_privacy.deployment.topology import Deployment, DeploymentFailure
from fl_privacy.recording_store import write_atomically


class Member(TypedDict):
    """A key that was registered, and the id that the SuperLink gave it; 0 if that was lost."""

    key: str
    id: int


def register(deployment: Deployment, node: int) -> None:
    """Let a node's key in, once, and the one that it had before no longer.

    Raises:
        DeploymentFailure: the SuperLink does not answer, or refuses.
    """
    public = _public(deployment, node)
    key = public.read_text()
    kept = _kept(deployment, node)
    if kept.exists():
        if _read(kept)["key"] == key:
            return
        unregister(deployment, node)
    try:
        number = int(ask(deployment, "supernode", "register", str(public))["node-id"])
    except DeploymentFailure as failure:
        if "already in use" not in str(failure):
            raise
        number = 0
    write_atomically([(kept, json.dumps(Member(key=key, id=number)).encode())])


def unregister(deployment: Deployment, node: int) -> None:
    """Let the key that a node had in no longer.

    Raises:
        DeploymentFailure: the SuperLink does not answer, or the key's id is not known.
    """
    kept = _kept(deployment, node)
    member = _read(kept)
    if not member["id"]:
        raise DeploymentFailure(
            f"the id of node {node} at the SuperLink was lost when it was registered: end the "
            f"deployment, remove {deployment.state}/superlink.db and *.registered, and up again"
        )
    ask(deployment, "supernode", "unregister", str(member["id"]))
    kept.rename(deployment.state / f"{member['id']}.left")


def spent_keys(deployment: Deployment) -> Iterator[str]:
    """A sentence for each node whose key left with it before: the SuperLink takes none twice."""
    left = {_read(kept)["key"] for kept in deployment.state.glob("*.left")}
    certs = deployment.certificates
    for node in range(len(deployment.nodes)):
        if left and (key := _public(deployment, node)).exists() and key.read_text() in left:
            yield (
                f"the key of node {node} left with its node, and the SuperLink takes none twice: "
                f"remove {certs}/node-{node}.* and {certs}/runtime-{node}.*, and up makes new ones"
            )


def former(deployment: Deployment) -> Iterator[int]:
    """Nodes that are let in, and no longer in the file."""
    for kept in deployment.state.glob("node-*.registered"):
        node = int(kept.stem.removeprefix("node-"))
        if node >= len(deployment.nodes):
            yield node


def online(deployment: Deployment) -> int:
    """How many SuperNodes are online."""
    nodes = ask(deployment, "supernode", "list")["nodes"]
    return sum(node["status"] == "online" for node in nodes)


def _public(deployment: Deployment, node: int) -> Path:
    return deployment.certificates / f"node-{node}.pub"


def _kept(deployment: Deployment, node: int) -> Path:
    return deployment.state / f"node-{node}.registered"


def _read(kept: Path) -> Member:
    found: Member = json.loads(kept.read_text())
    return found

"""What a deployment file says: which nodes, which ports, which run, and where all lies."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from fl_privacy.component import Component, describe
from fl_privacy.settings import Scalar, parse_settings
from fl_privacy.tls import general_name

EXAMPLE = """\
# A federation on this machine; fl-privacy deploy up brings it up.
folder = "deployed" # keys, state, logs, recordings; relative to this file

[ports]
fleet = 9092   # SuperNodes connect here: gRPC with TLS, registered keys only
control = 8000 # flwr commands and the ServerApp: TLS, on loopback
runtime = 9094 # of node 0's ClientApp; node N has the N-th after it

[run] # settings of every run, see: fl-privacy list settings
num-server-rounds = 3
"""
NODE = """
[[nodes]]
# dataset = "npz(path='/data/own.npz')" # data of its own instead of a share of the run's
# client-defense = "gaussian_noise(scale=0.1)"
"""

OWN_NODE_KEYS = {
    "client-dataset": "a node's own dataset is, in its table [[nodes]]",
    "client-audit-dir": "the node's folder is",
    "client-state-dir": "the node's folder is",
}
OWN_RUN_KEYS = {
    **OWN_NODE_KEYS,
    "out-dir": "the name given to the run is",
    "resume": "--resume is",
    "audit": "--audit is",
    "client-defense": "a node says its own, in its table [[nodes]]",
    "client-defended-share": "a node says its own defense, in its table [[nodes]]",
}


class DeploymentError(ValueError):
    """A deployment that cannot be used as its file says; the message says what to change."""


class DeploymentFailure(RuntimeError):
    """A process of a deployment that did not do what it should; the message says what it said."""


def _hyphens(table: Any) -> Any:
    return {str(k).replace("_", "-"): v for k, v in table.items()} if type(table) is dict else table


def check_run(table: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Run settings that a deployment leaves to whoever runs it.

    Raises:
        DeploymentError: one that it sets, or a node.
        ComponentError: an unknown or wrong one.
    """
    for key in table:
        if key in OWN_RUN_KEYS:
            raise DeploymentError(f"{key} is not set here: {OWN_RUN_KEYS[key]}")
    parse_settings(table)
    return dict(table)


RunTable = Annotated[dict[str, Scalar], BeforeValidator(_hyphens), AfterValidator(check_run)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Ports(Component):
    """Where processes listen."""

    fleet: Annotated[Port, Field(description="SuperNodes connect here")] = 9092
    control: Annotated[Port, Field(description="flwr and the ServerApp, on loopback")] = 8000
    runtime: Annotated[Port, Field(description="of node 0, on loopback; others follow")] = 9094


class Node(Component):
    """One SuperNode: what it trains on, and settings of its own."""

    dataset: Annotated[str, Field(description="data of its own; empty: its partition")] = ""
    superlink: Annotated[
        str,
        Field(
            pattern=r"^([A-Za-z0-9.-]+:[0-9]{1,5})?$",
            description="host:port where it finds the SuperLink; empty: the port fleet",
        ),
    ] = ""
    settings: Annotated[
        dict[str, Scalar], Field(default_factory=dict, description="client-... settings")
    ]

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, table: Any) -> Any:
        """``client-...`` keys of the table, as its settings."""
        if not isinstance(table, dict):
            return table
        table = _hyphens(table)
        own = {k: v for k, v in table.items() if k.startswith("client-")}
        return {k: v for k, v in table.items() if k not in own} | {"settings": own}

    @model_validator(mode="after")
    def _known(self) -> Self:
        for key in self.settings:
            if key in OWN_NODE_KEYS:
                raise ValueError(f"{key} is not set here: {OWN_NODE_KEYS[key]}")
        parse_settings(self.settings)
        return self


class Deployment(Component):
    """A whole deployment file."""

    folder: Annotated[str, Field(min_length=1, description="where all of it lies")] = "deployed"
    names: Annotated[
        tuple[str, ...], Field(description="of the server in its certificate, beside localhost")
    ] = ()
    listen: Annotated[
        IPv4Address, Field(description="address on which SuperNodes are awaited; 0.0.0.0 for all")
    ] = IPv4Address("127.0.0.1")
    ports: Annotated[Ports, Field(default_factory=Ports)]
    run: Annotated[RunTable, Field(default_factory=dict, description="settings of every run")]
    nodes: Annotated[tuple[Node, ...], Field(min_length=1, description="SuperNodes, in order")]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in self.names:
            general_name(name)
        last = self.ports.runtime + len(self.nodes) - 1
        if last > 65535:
            raise ValueError(f"ports: node {len(self.nodes) - 1} would listen on {last}")
        used = [self.ports.fleet, self.ports.control, *self.runtime_ports]
        if len(set(used)) < len(used):
            raise ValueError(f"ports: each once, got {', '.join(map(str, used))}")
        return self

    @property
    def runtime_ports(self) -> range:
        """Of each node."""
        return range(self.ports.runtime, self.ports.runtime + len(self.nodes))

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def certificates(self) -> Path:
        """What ``fl-privacy certs`` made."""
        return self.path / "certs"

    @property
    def state(self) -> Path:
        """SuperLink's database, secrets between processes, Flower's folders."""
        return self.path / "state"

    @property
    def logs(self) -> Path:
        """What each process says."""
        return self.path / "logs"

    @property
    def recordings(self) -> Path:
        """Run folders."""
        return self.path / "recordings"

    def node_folder(self, node: int) -> Path:
        """What is of one node and nobody else: truth of audits, account of its privacy."""
        return self.path / f"node-{node}"

    def node_config(self, node: int) -> dict[str, Scalar]:
        """What a SuperNode is told at its start."""
        own = self.nodes[node]
        folder = self.node_folder(node)
        return {
            "partition-id": node,
            "num-partitions": len(self.nodes),
            "client-audit-dir": str(folder / "runs"),
            "client-state-dir": str(folder / "state"),
            **({"client-dataset": own.dataset} if own.dataset else {}),
            **own.settings,
        }


def read_deployment(file: Path) -> Deployment:
    """The deployment that a TOML file describes, its folder made absolute.

    Raises:
        DeploymentError: the file is missing or not TOML.
        ComponentError: an unknown or wrong setting.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeploymentError(f"{file} does not exist; make one: fl-privacy deploy init") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeploymentError(f"cannot read {file}: {error}; expected a TOML file") from None
    try:
        found = Deployment.model_validate(document)
    except ValidationError as error:
        raise DeploymentError(describe(str(file), Deployment, error)) from None
    folder = (file.absolute().parent / found.folder).resolve()
    return found.model_copy(update={"folder": str(folder)})


def write_example(file: Path, *, nodes: int) -> None:
    """Write a deployment file of so many nodes, with a word on each setting.

    Raises:
        DeploymentError: there is such a file.
    """
    text = EXAMPLE + "\n".join([f"min-clients = {nodes}", *[NODE] * nodes])
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise DeploymentError(f"{file} exists, and is not overwritten; name a new file") from None

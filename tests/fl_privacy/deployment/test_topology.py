"""A deployment file, and the commands it comes to."""

from __future__ import annotations

import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_parser

from fl_privacy.component import ComponentError
from fl_privacy.deployment import local, members
from fl_privacy.deployment.local import (
    down,
    living,
    log_of,
    taken_ports,
    why_ended,
)
from fl_privacy.deployment.members import former, online, register, spent_keys, unregister
from fl_privacy.deployment.roles import Role, roles
from fl_privacy.deployment.runs import run
from fl_privacy.deployment.topology import (
    Deployment,
    DeploymentError,
    DeploymentFailure,
    read_deployment,
    write_example,
)
from fl_privacy.run_folder import private_folder
from fl_privacy.settings import parse_settings
from fl_privacy.simulation import write_toml
from fl_privacy.tls import CertificateError, add_nodes, write_certificates
from fl_privacy.tls_check import problems

PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "flower-superlink": superlink_parser,
    "flower-supernode": supernode_parser,
    "flower-superexec": superexec_parser,
}
TWO = "[[nodes]]\n[[nodes]]\n"


def read(folder: Path, text: str) -> Deployment:
    (folder / "deployment.toml").write_text(text)
    return read_deployment(folder / "deployment.toml")


def arguments(role: Role) -> Namespace:
    return PARSERS[role.command[0]]().parse_args(role.command[1:])


def test_the_example_is_a_deployment_and_its_comments_are_settings(tmp_path: Path) -> None:
    file = tmp_path / "deployment.toml"
    write_example(file, nodes=3)
    found = read_deployment(file)
    assert len(found.nodes) == 3
    assert found.path == tmp_path / "deployed"
    assert parse_settings(found.run).min_clients == 3
    defaults = Deployment.model_validate({"nodes": [{}]})
    assert found.ports == defaults.ports
    text = file.read_text().replace("# dataset", "dataset").replace("# client-", "client-")
    node = read(tmp_path, text).nodes[2]
    assert node.dataset
    assert node.settings == {"client-defense": "gaussian_noise(scale=0.1)"}
    with pytest.raises(DeploymentError, match="not overwritten"):
        write_example(file, nodes=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[nodes]\n", "expected a TOML file"),
        ("", "nodes is required"),
        ("nodes = []\n", "nodes"),
        ("folder = ''\n" + TWO, "folder"),
        ("names = ['no name']\n" + TWO, "no name"),
        ("[ports]\nfleet = 8000\n" + TWO, "ports: each once, got 8000, 8000, 9094, 9095"),
        ("[ports]\nruntime = 65535\n" + TWO, "node 1 would listen on 65536"),
        ("[ports]\nhealth = 1\n" + TWO, "no setting 'ports.health'"),
        ("[run]\nout-dir = '/x'\n" + TWO, "out-dir is not set here: the name given"),
        ("[run]\nclient-defense = 'x'\n" + TWO, "a node says its own"),
        ("[run]\nrounds = 3\n" + TWO, "no setting 'rounds'"),
        ("[[nodes]]\nclient-defence = 'x'\n", "no setting 'client-defence'"),
        ("[[nodes]]\nclient-audit-dir = '/x'\n", "client-audit-dir is not set here"),
        ("[[nodes]]\nlr = 0.1\n", "no setting 'nodes.0.lr'"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((DeploymentError, ComponentError)) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="fl-privacy deploy init"):
        read_deployment(tmp_path / "deployment.toml")


def test_no_link_is_in_plain_text_and_only_the_fleet_leaves_loopback(tmp_path: Path) -> None:
    found = read(tmp_path, "listen = '0.0.0.0'\n" + TWO)
    every = roles(found)
    assert len(every) == 6
    for role in every:
        given = arguments(role)
        assert not given.insecure
        assert given.superexec_auth_secret_file
        assert getattr(given, "host", "127.0.0.1") == "127.0.0.1"
        if hasattr(given, "root_certificates"):
            assert given.root_certificates.endswith("certs/ca.crt")
        if hasattr(given, "ssl_certfile"):
            assert given.ssl_certfile
            assert given.ssl_keyfile
    link = arguments(every[0])
    assert link.enable_supernode_auth
    assert link.isolation == "process"
    assert link.fleet_api_address == "0.0.0.0:9092"
    assert every[0].listens == (("127.0.0.1", 8000), ("0.0.0.0", 9092))


def test_each_superexec_shares_port_and_secret_with_one_holder_of_keys(tmp_path: Path) -> None:
    every = {role.name: arguments(role) for role in roles(read(tmp_path, TWO))}
    for app, holder in (
        ("serverapp", "superlink"),
        ("clientapp-0", "supernode-0"),
        ("clientapp-1", "supernode-1"),
    ):
        assert every[app].runtime_api_address == f"127.0.0.1:{every[holder].port}"
        assert every[app].superexec_auth_secret_file == every[holder].superexec_auth_secret_file
    assert len({one.superexec_auth_secret_file for one in every.values()}) == 3


def test_a_node_is_told_its_share_its_folders_and_its_own_settings(tmp_path: Path) -> None:
    text = '[[nodes]]\nclient_defense = "top_k(share=0.1)"\n[[nodes]]\ndataset = "npz(path=\'/d\')"'
    found = read(tmp_path, text)
    told = write_toml(tmp_path / "node.toml", found.node_config(0))
    assert parse_config_args([str(told)]) == {
        "partition-id": 0,
        "num-partitions": 2,
        "client-audit-dir": str(tmp_path / "deployed/node-0/runs"),
        "client-state-dir": str(tmp_path / "deployed/node-0/state"),
        "client-defense": "top_k(share=0.1)",
    }
    assert found.node_config(1)["client-dataset"] == "npz(path='/d')"
    for node in (0, 1):
        own = found.node_config(node).items()
        parse_settings({k: v for k, v in own if k.startswith("client-")})


def test_why_a_process_ended_is_told_in_words_and_in_its_own(tmp_path: Path) -> None:
    found = read(tmp_path, TWO)
    role = roles(found)[2]
    private_folder(found.logs)
    said = [
        "old\n" * 5000,
        "Exit Code: 305\n",
        "[code: 2004] Failed to activate SuperNode.\x1b[0m\n",
    ]
    log_of(found, role).write_text("".join(said))
    text = why_ended(found, role)
    assert text.startswith("supernode-0 ended: its key is not registered")
    assert text.endswith("[code: 2004] Failed to activate SuperNode.[0m")
    assert len(text.splitlines()) == 13


def test_a_node_that_is_added_gets_a_key_of_the_same_authority(tmp_path: Path) -> None:
    write_certificates(tmp_path / "certs", nodes=1)
    before = (tmp_path / "certs/node-0.key").read_bytes()
    add_nodes(tmp_path / "certs", [1, 2])
    assert problems(tmp_path / "certs", nodes=3) == []
    assert (tmp_path / "certs/node-0.key").read_bytes() == before
    with pytest.raises(CertificateError, match="not overwritten"):
        add_nodes(tmp_path / "certs", [2])
    (tmp_path / "certs/ca.key").unlink()
    with pytest.raises(CertificateError, match=r"ca\.key is missing, which signs for new nodes"):
        add_nodes(tmp_path / "certs", [3])


def test_who_leaves_or_has_a_new_key_is_no_longer_let_in_by_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[str, ...]]()

    def answer(_: Deployment, *command: str) -> dict[str, int]:
        asked.append(command[1:])
        return {"node-id": 100 + len(asked)}

    monkeypatch.setattr(members, "ask", answer)
    both = read(tmp_path, TWO)
    private_folder(both.certificates)
    private_folder(both.state)
    keys = [both.certificates / f"node-{node}.pub" for node in (0, 1)]
    for node, key in enumerate(keys):
        key.write_text(f"key {node}")
        register(both, node)
        register(both, node)
    assert asked == [("register", str(key)) for key in keys], "once each"
    keys[0].write_text("new key")
    register(both, 0)
    assert asked[2:] == [("unregister", "101"), ("register", str(keys[0]))]
    assert list(former(both)) == []
    alone = both.model_copy(update={"nodes": both.nodes[:1]})
    assert list(former(alone)) == [1]
    unregister(alone, 1)
    assert asked[4:] == [("unregister", "102")]
    assert list(former(alone)) == []
    assert not list(spent_keys(alone))
    (said,) = spent_keys(both)
    assert said.startswith("the key of node 1 left with its node, and the SuperLink takes none")


def test_a_key_registered_by_a_command_that_was_cut_off_is_kept_but_not_told_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> dict[str, int]:
        raise DeploymentFailure("Public key already in use.")

    monkeypatch.setattr(members, "ask", refuse)
    found = read(tmp_path, TWO)
    private_folder(found.certificates)
    private_folder(found.state)
    (found.certificates / "node-0.pub").write_text("key")
    register(found, 0)
    with pytest.raises(DeploymentFailure, match=r"lost when it was registered: .*superlink\.db"):
        unregister(found, 0)


def test_a_process_that_runs_with_what_was_changed_is_named(tmp_path: Path) -> None:
    """Its settings, its key or its certificate, as all are files that its command names."""
    found = read(tmp_path, TWO)
    private_folder(found.state)
    private_folder(found.certificates)
    role = next(role for role in roles(found) if role.name == "supernode-0")
    kept = found.state / "supernode-0.started"
    kept.write_text(local._terms(role))
    lives = [local.Living(role, frozenset({1}))]
    assert not list(local.outdated(found, lives))
    for path in (found.certificates / "node-0.key", found.certificates / "ca.crt"):
        path.write_text("other")
        (said,) = local.outdated(found, lives)
        assert said.startswith("supernode-0 runs with what has been changed since")
        kept.write_text(local._terms(role))
    link = next(role for role in roles(found) if role.name == "superlink")
    (found.state / "superlink.started").write_text(local._terms(link))
    (found.state / "superlink.db").write_text("grows")
    assert not list(local.outdated(found, [local.Living(link, frozenset({1}))]))
    alone = found.model_copy(update={"nodes": found.nodes[:1]})
    told_other = next(role for role in roles(alone) if role.name == "supernode-0")
    assert list(local.outdated(alone, [local.Living(told_other, frozenset({1}))])), "settings"
    assert not list(local.outdated(found, [local.Living(role, frozenset())]))


def test_a_defense_or_dataset_of_a_node_that_is_none_is_named(tmp_path: Path) -> None:
    text = """
[[nodes]]
client-defense = "gausian_noise(scale=0.1)"
[[nodes]]
dataset = "digitz"
[[nodes]]
client-defense = "gaussian_noise(scale=0.1)"
dataset = "digits"
"""
    first, second = local.unmade(read(tmp_path, text))
    assert first.startswith("node 0: ")
    assert "gaussian_noise" in first
    assert second.startswith("node 1: ")


def test_more_clients_than_nodes_are_not_waited_for(tmp_path: Path) -> None:
    found = read(tmp_path, TWO)
    private_folder(found.state)
    with pytest.raises(DeploymentError, match="min-clients = 3, but the deployment has 2 nodes"):
        run(found, "first", {"min-clients": 3})


def test_no_two_commands_bring_up_at_once(tmp_path: Path) -> None:
    found = read(tmp_path, TWO)
    private_folder(found.state)
    with (
        local._alone(found),
        pytest.raises(DeploymentError, match="another command is bringing up"),
        local._alone(found),
    ):
        pass
    with local._alone(found):
        pass


def test_asking_of_a_deployment_that_was_never_up_makes_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, TWO)
    assert not any(one.pids for one in living(found))
    assert down(found) == 0
    with pytest.raises(DeploymentFailure, match="fl-privacy deploy up"):
        online(found)
    assert not found.path.exists()


def test_a_run_may_not_set_what_its_nodes_or_the_deployment_set(tmp_path: Path) -> None:
    found = read(tmp_path, TWO)
    for key in ("client-defense", "client-audit-dir", "resume", "out-dir"):
        with pytest.raises(DeploymentError, match=f"{key} is not set here"):
            run(found, "first", {key: "x"})


def test_a_port_that_is_taken_is_named_with_who_wanted_it(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = read(tmp_path, f"[ports]\nfleet = {port}\n" + TWO)
        said = list(taken_ports(list(roles(found))))
    assert [text for text in said if f"superlink cannot listen on 127.0.0.1:{port}" in text]

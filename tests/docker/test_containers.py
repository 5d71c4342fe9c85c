"""What can be said of image and compose file without an engine: flags, links, secrets, pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser, Namespace
from collections import Counter
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from flwr.cli.flower_config import parse_superlink_connection
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_parser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fl_privacy import tls
from fl_privacy.component import VERSION

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PARSERS = {
    "flower-superlink": superlink_parser,
    "flower-supernode": supernode_parser,
    "flower-superexec": superexec_parser,
}
FLOWER = [name for name, one in SERVICES.items() if one.get("command", [""])[0] in PARSERS]
each_service = pytest.mark.parametrize("name", SERVICES)
each_flower = pytest.mark.parametrize("name", FLOWER)


def filled(text: str) -> str:
    """Text with the defaults of its variables, and VARIABLE where there is none."""
    return re.sub(r"\$\{\w+(?::([-?])([^}]*))?\}", lambda m: m[2] if m[1] == "-" else "X", text)


def parser_of(name: str) -> ArgumentParser:
    return PARSERS[SERVICES[name]["command"][0]]()


def arguments(name: str) -> Namespace:
    return parser_of(name).parse_args([filled(text) for text in SERVICES[name]["command"][1:]])


def of_role(command: str) -> list[str]:
    return [name for name in FLOWER if SERVICES[name]["command"][0] == command]


def mounts(name: str) -> list[list[str]]:
    """Source, target, and how, of each volume."""
    return [filled(text).split(":") for text in SERVICES[name].get("volumes", [])]


def dockerfile() -> list[str]:
    joined = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def test_all_roles_are_there() -> None:
    count = Counter(SERVICES[name]["command"][0] for name in FLOWER)
    assert count == {"flower-superlink": 1, "flower-supernode": 2, "flower-superexec": 3}


@each_flower
def test_every_flag_is_one_that_flower_documents(name: str) -> None:
    known = parser_of(name)._option_string_actions
    for text in SERVICES[name]["command"][1:]:
        flag, _, value = text.partition("=")
        assert flag in known
        assert known[flag].help not in (None, "==SUPPRESS==")
        assert "deprecated" not in str(known[flag].help).lower()
        assert bool(value) == (known[flag].nargs != 0)
    arguments(name)


@each_flower
def test_no_link_is_in_plain_text(name: str) -> None:
    given = arguments(name)
    assert not given.insecure
    if hasattr(given, "ssl_certfile"):
        assert given.ssl_certfile
        assert given.ssl_keyfile
        assert given.ssl_ca_certfile == "/certs/ca.crt"
    if hasattr(given, "root_certificates"):
        assert given.root_certificates == "/certs/ca.crt"


def test_nothing_is_insecure_by_any_name() -> None:
    for file in ("compose.yaml", "flower.toml", "Dockerfile"):
        assert "insecure" not in (DOCKER / file).read_text()


def test_only_registered_nodes_are_let_in() -> None:
    [link] = [arguments(name) for name in of_role("flower-superlink")]
    assert link.enable_supernode_auth
    keys = {arguments(name).auth_supernode_private_key for name in of_role("flower-supernode")}
    assert keys == {"/certs/node-0.key", "/certs/node-1.key"}


def test_apps_run_apart_from_keys() -> None:
    for name in (*of_role("flower-superlink"), *of_role("flower-supernode")):
        assert arguments(name).isolation == "process"
    for name in of_role("flower-superexec"):
        assert not any(target.endswith(".key") for _, target, *_ in mounts(name))


@each_flower
def test_everything_but_the_fleet_listens_on_loopback(name: str) -> None:
    given = arguments(name)
    assert getattr(given, "host", "127.0.0.1") == "127.0.0.1"
    assert given.health_server_address.partition(":")[0] == "127.0.0.1"
    assert SERVICES[name]["environment"]["HEALTH_ADDRESS"] == given.health_server_address


@each_service
def test_no_port_is_published(name: str) -> None:
    assert "ports" not in SERVICES[name]
    assert COMPOSE["networks"] == {"fleet": {"internal": True}}


@each_service
def test_each_service_has_a_network_of_its_group_only(name: str) -> None:
    kind, _, holder = SERVICES[name].get("network_mode", "service:" + name).partition(":")
    assert kind == "service"
    assert list(SERVICES[holder]["networks"]) == ["fleet"]
    assert SERVICES[holder]["command"] == ["sleep", "infinity"]
    assert ("networks" in SERVICES[name]) == (holder == name)


def test_who_speaks_to_whom() -> None:
    for name in of_role("flower-superexec"):
        group = SERVICES[name]["network_mode"]
        [served] = [
            arguments(other)
            for other in FLOWER
            if SERVICES[other]["network_mode"] == group and hasattr(arguments(other), "port")
        ]
        assert arguments(name).runtime_api_address == f"{served.host}:{served.port}"
    [link] = of_role("flower-superlink")
    holder = SERVICES[link]["network_mode"].removeprefix("service:")
    [alias] = SERVICES[holder]["networks"]["fleet"]["aliases"]
    port = arguments(link).fleet_api_address.rpartition(":")[2]
    for name in of_role("flower-supernode"):
        assert arguments(name).superlink == f"{alias}:{port}"


def test_ports_in_one_group_differ() -> None:
    ports: Counter[tuple[str, str]] = Counter()
    for name in FLOWER:
        given, group = arguments(name), SERVICES[name]["network_mode"]
        ports[group, given.health_server_address.rpartition(":")[2]] += 1
        if hasattr(given, "port"):
            ports[group, str(given.port)] += 1
        if hasattr(given, "fleet_api_address"):
            ports[group, given.fleet_api_address.rpartition(":")[2]] += 1
    assert set(ports.values()) == {1}


def test_control_reaches_the_superlink_on_its_loopback() -> None:
    written = tomllib.loads((DOCKER / "flower.toml").read_text())["superlink"]
    connection = parse_superlink_connection(written[written["default"]], written["default"])
    [link] = of_role("flower-superlink")
    given = arguments(link)
    assert connection.address == f"{given.host}:{given.port}"
    assert connection.root_certificates in [target for _, target, *_ in mounts("control")]
    assert SERVICES["control"]["network_mode"] == SERVICES[link]["network_mode"]


@each_service
def test_services_have_the_least_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["image"] == f"fl-privacy:{VERSION}"
    assert service["user"].startswith("${FL_PRIVACY_USER:?")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & service.keys()


def test_a_key_is_in_one_container_and_that_of_the_authority_in_none() -> None:
    made = tls.certificates(["superlink"], nodes=2, days=1, now=datetime.now(UTC))
    holders: Counter[str] = Counter()
    for name in SERVICES:
        for source, target, *how in mounts(name):
            if "/certs/" in source:
                file = source.rpartition("/")[2]
                assert (target, how) == (f"/certs/{file}", ["ro"])
                assert file in made
                holders[file] += 1
    keys = {file: n for file, n in holders.items() if file.endswith(".key")}
    expected = {"server.key", "node-0.key", "node-1.key", "runtime-0.key", "runtime-1.key"}
    assert keys == dict.fromkeys(expected, 1)


@each_flower
def test_files_that_commands_name_are_mounted(name: str) -> None:
    targets = [target for _, target, *_ in mounts(name)]
    for text in SERVICES[name]["command"][1:]:
        value = text.partition("=")[2]
        if value.startswith("/"):
            assert any(value == place or value.startswith(place + "/") for place in targets)


def test_data_and_truth_stay_with_their_node_and_recordings_with_the_server() -> None:
    shared = Counter(
        source for name in SERVICES for source, *_ in mounts(name) if "/certs/" not in source
    )
    assert set(shared.values()) == {1}
    assert ["X/recordings", "/runs"] in mounts("serverapp")
    for node in (0, 1):
        assert [f"X/node-{node}/data", "/data", "ro"] in mounts(f"clientapp-{node}")
        assert [f"X/node-{node}/runs", "/runs"] in mounts(f"clientapp-{node}")


def test_the_image_is_pinned_and_does_not_run_as_root() -> None:
    lines = dockerfile()
    [python] = [line.partition("=")[2] for line in lines if line.startswith("ARG PYTHON=")]
    assert re.fullmatch(r"3\.11\.\d+", python)
    bases = [line for line in lines if line.startswith("FROM")]
    assert all(line.startswith("FROM python:${PYTHON}-slim-") for line in bases)
    [user] = [line.split()[1] for line in lines if line.startswith("USER")]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert [line for line in lines if line.startswith("HEALTHCHECK")]
    assert "latest" not in TEXT + "".join(lines)
    after = lines.index(f"USER {user}")
    assert not [line for line in lines[after:] if line.startswith(("RUN", "COPY"))]


def test_no_secret_enters_the_image() -> None:
    allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    rules = [line for line in allowed if not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line[1:] for line in rules if line.startswith("!")}
    copied = {
        source
        for line in dockerfile()
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
    assert all(any(fnmatch(f"a/{n}", rule) for rule in rules[1:]) for n in ("x.key", "x.crt"))


def test_every_dependency_is_pinned_to_a_version_that_the_project_allows() -> None:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dp"]
    for requirement in map(Requirement, wanted):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def asked(address: str) -> int:
    """Exit status of the health check."""
    command = [sys.executable, str(DOCKER / "healthy.py")]
    return subprocess.run(
        command, env={**os.environ, "HEALTH_ADDRESS": address}, capture_output=True, timeout=60
    ).returncode


def test_the_health_check_asks_flower() -> None:
    server = run_health_server_grpc_no_tls("127.0.0.1:0")
    address = str(server.bound_address)
    try:
        assert asked(address) == 0
    finally:
        server.stop(0).wait()
    assert asked(address) == 1


@pytest.mark.parametrize(
    ("status", "user", "said"),
    [(1, 1000, "needs Docker"), (0, 0, "must not run as root"), (0, 1000, "")],
)
def test_make_says_what_is_missing_before_it_does_anything(
    tmp_path: Path, status: int, user: int, said: str
) -> None:
    for name, script in {"docker": f"exit {status}", "id": f"echo {user}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [make, "--no-print-directory", "container-engine"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (said == "")
    assert said in done.stderr

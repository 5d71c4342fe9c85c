"""A real federation over gRPC with TLS and keys: two SuperNodes on this machine."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_privacy.deployment import local, members, runs
from fl_privacy.deployment.roles import LOOPBACK
from fl_privacy.deployment.topology import Deployment, DeploymentError, DeploymentFailure
from fl_privacy.inspection import overview
from fl_privacy.recording import Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import Scalar
from fl_privacy.simulation import simulate
from fl_privacy.superlink import flower_environment
from fl_privacy.tls import write_certificates
from fl_privacy.truth import TruthVault
from tests.benchmarks.soak import free_ports

pytestmark = pytest.mark.flower
RUN: dict[str, Scalar] = {"dataset": "digits", "model": "mlp(hidden=(8,))", "lr": 0.1, "seed": 5}
OURS = 0o077
OTHER_CLOCK = """
import datetime

class Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return true.now(tz) + datetime.timedelta(seconds={skew})

true, datetime.datetime = datetime.datetime, Skewed
"""
"""A module that Python reads at its start."""


def free_pair() -> int:
    """The first of two free ports in a row."""
    while True:
        (port,) = free_ports(1)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port + 1))
            except (OSError, OverflowError):
                continue
            return port


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    fleet, control = free_ports(2)
    ports = {"fleet": fleet, "control": control, "runtime": free_pair()}
    folder = tmp_path_factory.mktemp("deployed") / "all"
    made = Deployment.model_validate(
        {"folder": str(folder), "ports": ports, "run": RUN, "nodes": [{}, {}]}
    )
    try:
        local.up(made)
        yield made
    finally:
        local.down(made)
        assert not any(one.pids for one in local.living(made))


def contents(run: Path) -> set[tuple[int, str, str]]:
    """Round, what was sent, and a digest of what came back, of each update."""
    recording = Recording(run / "recording")
    return {
        (
            entry.round,
            entry.global_digest,
            hashlib.sha256(
                b"".join(t.numpy().tobytes() for t in recording.returned(entry).values())
            ).hexdigest(),
        )
        for entry in recording.entries()
    }


@pytest.mark.timeout(900)
def test_a_deployed_run_records_the_very_bits_of_the_simulated_one(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployed = runs.run(deployment, "first", {"num-server-rounds": 2}, audit=True)
    simulate({**RUN, "num-server-rounds": 2}, out=tmp_path / "simulated", clients=2)
    assert contents(deployed) == contents(tmp_path / "simulated")
    assert len(contents(deployed)) == 4
    assert overview(Recording(deployed / "recording"))
    assert not (deployed / "truth").exists(), "truth stays with the nodes"
    kept = [TruthVault(deployment.node_folder(n) / "runs/first/truth") for n in (0, 1)]
    assert [len(list(vault.root.rglob("*.safetensors"))) for vault in kept] == [2, 2]
    assert not {*kept[0].nodes().values()} & {*kept[1].nodes().values()}
    for path in (*deployment.path.rglob("*.safetensors"), *deployment.path.rglob("*.jsonl")):
        assert not path.stat().st_mode & OURS, f"{path} is open to others"
    for folder in (deployment.path, deployment.state, deployed):
        assert not folder.stat().st_mode & OURS


def listening() -> list[tuple[str, int]]:
    """Address and port of every IPv4 socket on this machine that listens; and of IPv6 as text."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local_address, _, state, *_ = line.split()
        address, port = local_address.split(":")
        if state == "0A":
            packed = bytes.fromhex(address)[::-1]
            found.append((socket.inet_ntoa(packed), int(port, 16)))
    for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]:
        _, local_address, _, state, *_ = line.split()
        if state == "0A":
            found.append((local_address[:32], int(local_address[33:], 16)))
    return found


@pytest.mark.timeout(600)
def test_who_is_not_let_in(deployment: Deployment, tmp_path: Path) -> None:
    """No registered key, no key, another authority, no TLS: each ends, and says why."""
    write_certificates(tmp_path / "other", nodes=1)
    own, other = deployment.certificates, tmp_path / "other"
    link = f"--superlink={LOOPBACK}:{deployment.ports.fleet}"
    trusting, key = f"--root-certificates={own}/ca.crt", "--auth-supernode-private-key="
    cases = {
        "code: 2004": (trusting, f"{key}{other}/node-0.key"),
        "code: 2001": (trusting,),
        "CERTIFICATE_VERIFY_FAILED": (
            f"--root-certificates={other}/ca.crt",
            f"{key}{own}/node-0.key",
        ),
        "Socket closed": ("--insecure",),
    }
    before = members.online(deployment)
    (port,) = free_ports(1)
    alone = ("--isolation=process", f"--port={port}", "--max-retries=1")
    for said, options in cases.items():
        done = subprocess.run(
            ["flower-supernode", link, *alone, *options],
            env=flower_environment(tmp_path / "home"),
            capture_output=True,
            timeout=120,
            text=True,
            check=False,
        )
        assert done.returncode != 0, f"{options} was let in: {done.stdout}"
        text = done.stdout + done.stderr
        assert said in text
        assert said in local.KNOWN
    assert members.online(deployment) == before == 2


@pytest.mark.parametrize("skew", [8, -400])
@pytest.mark.timeout(200)
def test_a_clock_that_is_off_lets_nobody_in_and_the_reason_is_told(
    skew: int, deployment: Deployment, tmp_path: Path
) -> None:
    """Flower itself says nothing but that the SuperNode terminated gracefully."""
    (tmp_path / "sitecustomize.py").write_text(OTHER_CLOCK.format(skew=skew))
    (role,) = (one.role for one in local.living(deployment) if one.role.name == "supernode-0")
    (port,) = free_ports(1)
    kept = ("--superlink", "--root-certificates", "--auth-supernode-private-key")
    done = subprocess.run(
        [
            role.command[0],
            *(option for option in role.command if option.startswith(kept)),
            *("--isolation=process", f"--port={port}"),
        ],
        env=flower_environment(tmp_path / "home") | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=120,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "SuperNode ID:" not in said
    assert any(text in said and "clock" in why for text, why in local.KNOWN.items()), said
    assert members.online(deployment) == 2


def test_the_fleet_speaks_tls_only_and_control_listens_on_loopback(deployment: Deployment) -> None:
    context = ssl.create_default_context(cafile=f"{deployment.certificates}/ca.crt")
    for port in (deployment.ports.fleet, deployment.ports.control, *deployment.runtime_ports):
        with (
            socket.create_connection((LOOPBACK, port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as wrapped,
        ):
            assert wrapped.version() in ("TLSv1.2", "TLSv1.3")
    for port in (deployment.ports.control, *deployment.runtime_ports):
        assert {address for address, other in listening() if other == port} == {LOOPBACK}


@pytest.mark.timeout(600)
def test_up_starts_only_what_ended_and_a_run_goes_on_after_it(deployment: Deployment) -> None:
    """The SuperLink and a server app are killed in mid-run; `--resume` makes all rounds whole."""
    name, total = "second", 3
    folder = RunFolder(deployment.recordings / name)
    ended = list[dict[str, frozenset[int]]]()

    def kill_after_a_round(_line: str) -> None:
        if ended or runs.rounds_done(folder) < 1:
            return
        before = {one.role.name: one.pids for one in local.living(deployment)}
        for role in ("superlink", "serverapp"):
            for pid in before[role]:
                os.kill(pid, signal.SIGKILL)
        ended.append(before)

    with pytest.raises(DeploymentFailure, match="--resume goes on"):
        runs.run(deployment, name, {"num-server-rounds": total}, stream=kill_after_a_round)
    local.up(deployment)
    now = {one.role.name: one.pids for one in local.living(deployment)}
    assert now["supernode-0"] >= {min(ended[0]["supernode-0"])}
    assert now["superlink"] != ended[0]["superlink"]
    # Flower takes a minute and a half to find that the server app is gone; this does not wait
    assert runs.stop(deployment, name)
    runs.run(deployment, name, {"num-server-rounds": total}, resume=True)
    assert runs.rounds_done(folder) == total
    recording = Recording(folder.recording)
    assert not recording.verify()
    assert len(list(recording.entries())) >= 2 * total
    with pytest.raises(DeploymentError, match="has its 3 rounds"):
        runs.run(deployment, name, {"num-server-rounds": total}, resume=True)


@pytest.mark.timeout(400)
def test_a_node_that_was_killed_is_let_in_again(deployment: Deployment) -> None:
    """Though the SuperLink takes it for online at first, and refuses its key."""
    for one in local.living(deployment):
        if one.role.name in ("supernode-1", "clientapp-1"):
            for pid in one.pids:
                os.kill(pid, signal.SIGKILL)
    local.up(deployment)
    assert all(one.pids for one in local.living(deployment))
    (role,) = (r.role for r in local.living(deployment) if r.role.name == "supernode-1")
    assert local.log_of(deployment, role).read_text().count("SuperNode ID:") >= 2


@pytest.mark.timeout(400)
def test_a_node_that_is_no_longer_in_the_file_is_no_longer_let_in(deployment: Deployment) -> None:
    alone = deployment.model_copy(update={"nodes": deployment.nodes[:1]})
    with pytest.raises(DeploymentError, match="supernode-0 runs with what has been changed"):
        local.up(alone)
    local.down(deployment)
    local.up(alone)
    assert members.online(alone) == 1
    with pytest.raises(DeploymentError, match="the key of node 1 left with its node"):
        local.up(deployment.model_copy(update={"nodes": deployment.nodes[:1] * 2}))


def test_what_keeps_a_deployment_from_starting_is_named_at_once(
    deployment: Deployment, tmp_path: Path
) -> None:
    taken = deployment.model_copy(update={"folder": str(tmp_path / "other")})
    with pytest.raises(DeploymentError, match=r"superlink cannot listen on 127\.0\.0\.1"):
        local.up(taken)
    (taken.certificates / "node-1.key").unlink()
    (taken.certificates / "ca.key").chmod(0o644)
    with pytest.raises(DeploymentError, match=r"ca\.key has mode 644.*node-1\.key is missing"):
        local.up(taken)
    assert not any(one.pids for one in local.living(taken))
    with pytest.raises(DeploymentError, match="expected a name for the run"):
        runs.run(deployment, "../first", {})

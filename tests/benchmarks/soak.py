"""Soak: a real federation with a random fault every few rounds, and whether anything was lost.

    python tests/benchmarks/soak.py --rounds 30 --seed 0

Two SuperNodes over gRPC with TLS, one of them through a wire that can be cut. Faults: a SuperNode
is killed; the SuperLink is killed, at times with the server app; the wire is cut without a word
to either end; the disk with the recording is filled (a small file system of its own, which needs
root). Each is mended after a while, as an operator would: ``deploy up``, ``--resume``, the wire
healed, room made. Prints what happened and what the recording holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fl_privacy.deployment import local, runs
from fl_privacy.deployment.topology import Deployment
from fl_privacy.recording import Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import Scalar

LOOPBACK = "127.0.0.1"
NAME = "soak"
DISK_BYTES = 16 * 2**20
RUN: dict[str, Scalar] = {
    "min-clients": 1,
    "wait-seconds": 300.0,
    "round-seconds": 120.0,
    "lr": 0.05,
    "batch-size": 32,
}


class Wire(threading.Thread):
    """Forwards bytes between a SuperNode and the SuperLink; cut, they wait, as TCP lets them."""

    def __init__(self, port: int, target: int) -> None:
        super().__init__(daemon=True)
        self.cut = False
        self._target = target
        self._server = socket.create_server((LOOPBACK, port))

    def run(self) -> None:
        while True:
            near, _ = self._server.accept()
            threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        self._await_healing()
        try:
            far = socket.create_connection((LOOPBACK, self._target))
        except OSError:
            near.close()
            return
        other = {near: far, far: near}
        with near, far, selectors.DefaultSelector() as ready, suppress(OSError):
            for end in other:
                ready.register(end, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select(timeout=1.0):
                    self._await_healing()
                    end = near if key.fileobj is near else far
                    data = end.recv(2**16)
                    if not data:
                        return
                    other[end].sendall(data)

    def _await_healing(self) -> None:
        while self.cut:
            time.sleep(0.1)


@dataclass
class Soak:
    """What is under test, and what happened to it."""

    deployment: Deployment
    wire: Wire
    total: int
    events: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.deployment.recordings / NAME)

    @property
    def done(self) -> int:
        return runs.rounds_done(self.folder)

    def tell(self, what: str) -> None:
        self.events.append(what)
        print(f"{time.monotonic() - self.start:6.0f} s, round {self.done:2}: {what}", flush=True)

    def kill(self, *names: str) -> None:
        for one in local.living(self.deployment):
            if one.role.name in names:
                for pid in one.pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def kill_node(soak: Soak, draw: random.Random) -> None:
    node = draw.randrange(2)
    soak.tell(f"node {node} killed")
    soak.kill(f"supernode-{node}", f"clientapp-{node}")
    time.sleep(draw.uniform(5, 40))
    local.up(soak.deployment)
    soak.tell(f"node {node} back, with the same key")


def kill_superlink(soak: Soak, draw: random.Random) -> None:
    whole = draw.random() < 0.5
    soak.tell(f"SuperLink killed{', and the server app' if whole else ', the server app lives'}")
    soak.kill("superlink", *(["serverapp"] if whole else []))
    time.sleep(draw.uniform(1, 10))
    local.up(soak.deployment)
    soak.tell("SuperLink back, with its database")


def cut_wire(soak: Soak, draw: random.Random) -> None:
    soak.tell("network of node 1 cut")
    soak.wire.cut = True
    time.sleep(draw.uniform(5, 60))
    soak.wire.cut = False
    soak.tell("network healed")


def fill_disk(soak: Soak, draw: random.Random) -> None:
    soak.tell("disk filled")
    ballast = soak.deployment.recordings / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(2**16))
    before, limit = soak.done, time.monotonic() + draw.uniform(20, 60)
    while soak.done < before + 2 and time.monotonic() < limit:
        time.sleep(0.5)
    ballast.unlink()
    soak.tell("room on the disk again")


FAULTS: tuple[Callable[[Soak, random.Random], None], ...] = (
    kill_node,
    kill_superlink,
    cut_wire,
    fill_disk,
)


def train(soak: Soak) -> None:
    """Run all rounds, resuming as often as it takes."""
    resume = False
    while soak.done < soak.total:
        try:
            settings = {**RUN, "num-server-rounds": soak.total}
            runs.run(soak.deployment, NAME, settings, resume=resume)
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            soak.tell(f"the command ended: {first[:160]}")
            time.sleep(5)
        resume = soak.folder.manifest.exists()


def break_things(soak: Soak, draw: random.Random, finished: threading.Event) -> Counter[str]:
    """A fault every two to four rounds, each kind as often as the others, until all is done."""
    count: Counter[str] = Counter()
    order: list[Callable[[Soak, random.Random], None]] = []
    while not finished.is_set():
        due = soak.done + draw.randint(2, 4)
        while soak.done < due and not finished.wait(0.5):
            pass
        if finished.is_set() or soak.done >= soak.total - 1:
            break
        order = order or draw.sample(FAULTS, len(FAULTS))
        fault = order.pop()
        time.sleep(draw.uniform(0, 8))  # anywhere in a round
        fault(soak, draw)
        count[fault.__name__] += 1
    return count


def report(soak: Soak, faults: Counter[str]) -> dict[str, object]:
    recording = Recording(soak.folder.recording)
    entries = list(recording.entries(status=None))
    lines = soak.folder.history.read_text().splitlines()
    history = [json.loads(line) for line in lines if json.loads(line)["round"]]
    listed = {(entry.attempt, entry.round) for entry in entries}
    missing = [e for e in entries if e.unrecorded]
    ok = [entry for entry in entries if entry.ok]
    for entry in ok:
        assert all(tensor.isfinite().all() for tensor in recording.returned(entry).values())
        assert all(tensor.isfinite().all() for tensor in recording.sent(entry).values())
    return {
        "rounds": soak.done,
        "faults": dict(faults),
        "attempts": max(entry.attempt for entry in entries),
        "updates recorded": len(ok),
        "error replies recorded": len(entries) - len(ok) - len(missing),
        "lines that mark what is not recorded (disk full)": len(missing),
        "completed rounds that the recording does not list": sum(
            (line["attempt"], line["round"]) not in listed for line in history
        ),
        "damaged or lost listed updates": len(recording.verify()),
        "accuracy, first and last round": (history[0]["accuracy"], history[-1]["accuracy"]),
        "seconds": round(time.monotonic() - soak.start),
    }


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    fleet, control, entry, runtime = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        deployment = Deployment.model_validate(
            {
                "folder": f"{temporary}/deployed",
                "ports": {"fleet": fleet, "control": control, "runtime": runtime},
                "nodes": [{}, {"superlink": f"{LOOPBACK}:{entry}"}],
            }
        )
        wire = Wire(entry, fleet)
        wire.start()
        with small_disk(deployment.recordings):
            soak, finished = Soak(deployment, wire, given.rounds), threading.Event()
            try:
                local.up(deployment)
                soak.tell("two SuperNodes online")
                faults: Counter[str] = Counter()
                breaking = threading.Thread(
                    target=lambda: faults.update(
                        break_things(soak, random.Random(given.seed), finished)
                    )
                )
                breaking.start()
                train(soak)
                finished.set()
                breaking.join()
                for name, value in report(soak, faults).items():
                    print(f"{name}: {value}")
            finally:
                finished.set()
                local.down(deployment)


if __name__ == "__main__":
    main()

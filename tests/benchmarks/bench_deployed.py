"""What recording costs in a deployed round, in time and on disk.

Run ``python tests/benchmarks/bench_deployed.py [--rounds N] [--repeats N]``. Two SuperNodes over
gRPC with TLS on this machine; runs that record and runs that record nothing take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from fl_privacy.deployment import local, runs
from fl_privacy.deployment.topology import Deployment
from fl_privacy.recording import Recording
from fl_privacy.settings import Scalar
from tests.benchmarks.soak import free_ports

MODELS: dict[str, dict[str, Scalar]] = {
    "lenet": {"model": "lenet-zhu"},
    "mlp-25-million": {"model": "mlp(hidden=(12000, 1250))", "eval-samples": 100},
}
NOTHING = "999999"
"""Rounds to record where nothing is recorded."""


def seconds_a_round(folder: Path) -> list[float]:
    """How long each round after the first took, in which clients start."""
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in history]
    return [end - start for start, end in pairwise(ends[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    fleet, control, runtime = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        deployment = Deployment.model_validate(
            {
                "folder": f"{temporary}/deployed",
                "ports": {"fleet": fleet, "control": control, "runtime": runtime},
                "run": {"num-server-rounds": given.rounds},
                "nodes": [{}, {}],
            }
        )
        try:
            local.up(deployment)
            for name, settings in MODELS.items():
                measure(deployment, name, settings, given.repeats)
        finally:
            local.down(deployment)


def measure(deployment: Deployment, name: str, settings: dict[str, Scalar], repeats: int) -> None:
    """Print seconds a round and bytes on disk of one model."""
    seconds: dict[str, list[float]] = {"": [], NOTHING: []}
    for repeat in range(repeats):
        for rounds, found in seconds.items():
            run = f"{name}-{repeat}-{rounds or 'all'}"
            folder = runs.run(deployment, run, {**settings, "record-rounds": rounds})
            found.extend(seconds_a_round(folder))
    recorded, plain = (statistics.median(found) for found in seconds.values())
    spread = max(statistics.stdev(found) for found in seconds.values())
    recording = Recording(folder.with_name(f"{name}-0-all") / "recording")
    entries = list(recording.entries())
    tensors = sum(t.nbytes for entry in entries for t in recording.returned(entry).values())
    on_disk = sum(entry.bytes for entry in entries)
    print(
        f"{name}: a round {recorded:.2f} s recorded, {plain:.2f} s not (medians of "
        f"{len(seconds[''])}, sd {spread:.2f} s): {recorded / plain:.3f} x; "
        f"{on_disk / tensors:.4f} x the tensors' {tensors / len(entries):,.0f} bytes on disk"
    )


if __name__ == "__main__":
    main()

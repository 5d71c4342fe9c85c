"""What recording costs: per reply, as a share of a round, and in memory.

Run ``python tests/benchmarks/bench_recording.py [--rounds N] [--folder DIR]``. The grid is
in-process, so a round is nothing but ten clients' local SGD, Flower's messages and the
aggregation: a real simulation adds at least two 0.1 s polls and makes the share smaller.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from fl_privacy.recording import Manifest, Recording, RecordingWriter
from fl_privacy.recording_format import LINES_PER_SEGMENT
from strategies.recording import RecordingStrategy
from tests.strategies.in_process_grid import Client, InProcessGrid

CLIENTS = 10
LARGE_CLIENTS = 20
MANIFEST = Manifest(created="2025-01-01T00:00:00Z", model="lenet-zhu")


def lenet() -> nn.Module:
    """LeNet of Zhu et al. (NeurIPS 2019) for 28x28 gray images."""

    def convolution(channels: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 12, 5, padding=2, stride=stride), nn.Sigmoid()]

    layers = [*convolution(1, 2), *convolution(12, 2), *convolution(12, 1), *convolution(12, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(588, 10))


def trainer(samples: int, batch_size: int) -> Client:
    """A client that takes one epoch of SGD over random images."""
    inputs, labels = torch.rand(samples, 1, 28, 28), torch.randint(10, (samples,))
    model = lenet()

    def client(content: RecordDict, node: int) -> RecordDict:
        model.load_state_dict(content.array_records["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for start in range(0, samples, batch_size):
            batch = slice(start, start + batch_size)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        metrics = MetricRecord({"num-examples": samples})
        return RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})

    return client


def plain_strategy() -> Strategy:
    """FedAvg that trains every client and evaluates none."""
    return FedAvg(min_train_nodes=CLIENTS, fraction_evaluate=0.0)


def round_seconds(strategy: Strategy, client: Client) -> float:
    """Wall time of one round."""
    grid = InProcessGrid(client, range(2, 2 + CLIENTS))
    arrays = ArrayRecord(lenet().state_dict())
    started = time.perf_counter()
    strategy.start(grid, arrays, num_rounds=1)
    return time.perf_counter() - started


def seconds_per_reply(folder: Path, replies: int = 200) -> float:
    """Median wall time of one `RecordingWriter.append` of a LeNet."""
    arrays = {name: tensor.numpy() for name, tensor in lenet().state_dict().items()}
    times = []
    with RecordingWriter.open(folder, MANIFEST) as writer:
        _, sent = writer.put_global(arrays)
        for i in range(replies):
            started = time.perf_counter()
            writer.append(round=i, node=str(i), arrays=arrays, num_examples=1, global_digest=sent)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def seconds_to_open(folder: Path, lines: int = 100_000) -> float:
    """Wall time to open a recording with that many index lines and filter one round."""
    with RecordingWriter.open(folder, MANIFEST) as writer:
        arrays = {name: tensor.numpy() for name, tensor in lenet().state_dict().items()}
        _, sent = writer.put_global(arrays)
        writer.append(round=1, node=str(2**63), arrays=arrays, num_examples=1, global_digest=sent)
    line = (folder / "index/000000.jsonl").read_bytes()
    for segment in range(lines // LINES_PER_SEGMENT):
        (folder / f"index/{segment:06d}.jsonl").write_bytes(line * LINES_PER_SEGMENT)
    started = time.perf_counter()
    assert sum(1 for _ in Recording(folder).entries(rounds={2})) == 0
    return time.perf_counter() - started


def compare(folder: Path, client: Client, rounds: int) -> tuple[float, float]:
    """Median seconds of a round without and with recording, alternating in one process."""
    plain, recorded = [], []
    with RecordingWriter.open(folder, MANIFEST) as writer:
        watched = RecordingStrategy(plain_strategy(), writer)
        for _ in range(rounds + 1):
            plain.append(round_seconds(plain_strategy(), client))
            recorded.append(round_seconds(watched, client))
    return statistics.median(plain[1:]), statistics.median(recorded[1:])


def peak_megabytes(folder: Path, rounds: int) -> float:
    """Peak resident memory of this process while it records, imports left out (Linux)."""
    client = trainer(8, 8)
    round_seconds(plain_strategy(), client)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with RecordingWriter.open(folder, MANIFEST) as writer:
        strategy = RecordingStrategy(plain_strategy(), writer)
        grid = InProcessGrid(client, range(2, 2 + CLIENTS))
        strategy.start(grid, ArrayRecord(lenet().state_dict()), num_rounds=rounds)
    return peak_mebibytes()


def peak_of_large(folder: Path, recorded: bool) -> float:
    """Peak resident memory, MiB, of a round of 20 clients with the weights of a ResNet-50."""
    model = nn.Linear(25_557_032 // 1_000, 1_000, bias=False)

    def client(content: RecordDict, node: int) -> RecordDict:
        (sent,) = content.array_records.values()
        state = {n: t + node for n, t in sent.to_torch_state_dict().items()}
        return RecordDict({"a": ArrayRecord(state), "m": MetricRecord({"num-examples": 1})})

    grid = InProcessGrid(client, range(2, 2 + LARGE_CLIENTS))
    arrays = ArrayRecord(model.state_dict())
    Path("/proc/self/clear_refs").write_text("5")
    with RecordingWriter.open(folder, MANIFEST) as writer:
        strategy: Strategy = FedAvg(fraction_evaluate=0.0)
        if recorded:
            strategy = RecordingStrategy(strategy, writer)
        strategy.start(grid, arrays, num_rounds=2)
    return peak_mebibytes()


def peak_mebibytes() -> float:
    """Of this process, since its peak was reset (Linux)."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1024


def report(folder: Path, rounds: int) -> None:
    """Print every figure."""
    print(f"one LeNet reply: {seconds_per_reply(folder / 'replies') * 1e3:.2f} ms")
    print(f"100,000 index lines: {seconds_to_open(folder / 'lines'):.2f} s")
    for name, samples, batch in (
        ("FedSGD, 1 sample", 1, 1),
        ("FedAvg, 200 samples, B 32", 200, 32),
    ):
        where = folder / f"rounds-{samples}"
        plain, recorded = compare(where, trainer(samples, batch), rounds)
        print(
            f"{name}: {plain * 1e3:.1f} ms a round, {recorded * 1e3:.1f} ms recorded, "
            f"{(recorded - plain) * 1e3:+.1f} ms ({(recorded / plain - 1):+.1%}, "
            f"median of {rounds})"
        )
    for count in (10, 100):
        command = [sys.executable, __file__, "--peak", str(count), "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak memory, {count} recorded rounds: {float(done.stdout):.1f} MiB")
    for how in ("plain", "recorded"):
        command = [sys.executable, __file__, "--large", how, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(
            f"peak memory, {LARGE_CLIENTS} clients of 25.6 million weights, {how}: "
            f"{float(done.stdout):,.0f} MiB"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where to record; a temporary folder")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--large", choices=("plain", "recorded"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.peak:
            print(peak_megabytes(Path(folder) / "peak", options.peak))
        elif options.large:
            print(peak_of_large(Path(folder) / "large", options.large == "recorded"))
        else:
            report(Path(folder), options.rounds)


if __name__ == "__main__":
    main()

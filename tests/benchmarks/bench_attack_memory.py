"""Memory and time of `fl-privacy attack` on 128 targets (one chunk) and on 10,000.

Each attack is a process of its own, whose peak resident memory is printed: LeNet on 3x32x32
pictures, one image a target, two iterations of gradient similarity, audited, all metrics, the
baseline beside it. What the second needs beyond the first is the price of a target that waits
or is done. Run by `make bench`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from fl_privacy.models.zhu import LeNetZhu
from fl_privacy.recording import Layout, Manifest, RecordingWriter, Reply
from fl_privacy.seeding import generator
from fl_privacy.truth import TruthVault
from fl_privacy.types import LocalTraining, Samples, Task

TASK = Task(input_shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
TRAINING = LocalTraining(lr=0.1)
GROUP = 500


@dataclass(frozen=True)
class Cost:
    """What one process took: seconds on the clock and of a core, and bytes at its peak."""

    seconds: float
    core_seconds: float
    peak: int


def picture(node: int) -> Samples:
    """A random low-frequency picture, which needs no download."""
    coarse = torch.rand(1, 3, 5, 5, generator=generator(0, "bench", node))
    inputs = F.interpolate(coarse, size=32, mode="bicubic", align_corners=True).clamp(0, 1)
    return Samples(inputs, torch.tensor([node % TASK.classes]))


def record(run: Path, targets: int) -> None:
    """An audited run of clients that take one SGD step on one picture each."""
    model = LeNetZhu().build(TASK, seed=0)
    layout, names = Layout.of(model), [name for name, _ in model.named_parameters()]
    vault = TruthVault(run / "truth")
    manifest = Manifest(created="", model="lenet-zhu", task=TASK, local_training=TRAINING)

    def reply(node: int, sent: str) -> Reply:
        held = picture(node)
        vault.write(
            attempt=1, round=1, node=str(node), step=0, samples=held, indices=torch.tensor([node])
        )
        loss = F.cross_entropy(model(TASK.normalize(held.inputs)), held.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        steps = zip(names, model.parameters(), gradients, strict=True)
        arrays = {n: (p - TRAINING.lr * g).detach().numpy() for n, p, g in steps}
        return Reply(1, str(node), arrays, 1, sent, layout)

    def replies(first: int, sent: str) -> Iterator[Reply]:
        return (reply(node, sent) for node in range(first, min(first + GROUP, targets)))

    with RecordingWriter.open(run / "recording", manifest) as writer:
        state = {n: t.numpy() for n, t in model.state_dict().items()}
        _, sent = writer.put_global(state, layout)
        for first in range(0, targets, GROUP):
            writer.extend(replies(first, sent))


def attack(run: Path, targets: int, iterations: int) -> Cost:
    """`fl-privacy attack` in a process of its own."""
    command = [sys.executable, "-c", "from fl_privacy.cli import main; main()", "attack", str(run)]
    options = [f"--targets={targets}", f"--seed={targets}", f"--set=iterations={iterations}"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the attack ended with {os.waitstatus_to_exitcode(status)}: {said}")
    core_seconds = usage.ru_utime + usage.ru_stime
    return Cost(time.perf_counter() - start, core_seconds, usage.ru_maxrss * 1024)


def main() -> None:
    """Record once, attack twice, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=128, help="targets of one chunk")
    parser.add_argument("--many", type=int, default=10_000, help="targets of many chunks")
    parser.add_argument("--iterations", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        start = time.perf_counter()
        record(run, options.many)
        print(f"recorded {options.many:,} updates in {time.perf_counter() - start:.0f} s")
        few = attack(run, options.few, options.iterations)
        many = attack(run, options.many, options.iterations)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for targets, cost in ((options.few, few), (options.many, many)):
        print(
            f"{targets:>7,} targets: {cost.peak / 2**20:6.0f} MiB at most, {cost.seconds:.1f} s, "
            f"{cost.core_seconds:.1f} s of a core"
        )
    more = options.many - options.few
    print(
        f"each further target: {(many.peak - few.peak) / more / 1024:.1f} KiB, "
        f"{1000 * (many.core_seconds - few.core_seconds) / more:.2f} ms of a core"
    )


if __name__ == "__main__":
    main()

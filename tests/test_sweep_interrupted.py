"""A real sweep of two points, stopped by Ctrl-C in the second and resumed side by side."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fl_privacy.recording import Recording

SWEEP = """
[run]
clients = 2
dataset = "digits"
model = "mlp"
num-server-rounds = 1
[train]
[defenses.none]
[defenses.noise]
spec = "gaussian_noise(scale={strength})"
strengths = [0.001]
[[attacks]]
adversary = "analytic"
"""
MEASURED = ("accuracy", "metric", "mean", "n")


def sweep(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    code = "from fl_privacy.cli import main; main()"
    command = [sys.executable, "-c", code, "sweep", str(file), "--out", str(out), *options]
    said = (out.parent / f"{out.name}.txt").open("ab")
    return subprocess.Popen(command, cwd=file.parent, stderr=said)


def numbers(out: Path, defense: str) -> list[tuple[str, ...]]:
    """What the analytic attack measured, which draws nothing.

    The baseline draws labels from a reply's digest, and with it from Flower's random node ids.
    """
    rows = csv.DictReader((out / "sweep.csv").open())
    mine = [row for row in rows if (row["defense"], row["adversary"]) == (defense, "plain")]
    return [tuple(row[name] for name in MEASURED) for row in mine]


@pytest.mark.flower
@pytest.mark.timeout(900)  # four simulations: a minute on an idle machine
def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    file, out, points = tmp_path / "two.toml", tmp_path / "out", tmp_path / "out" / "points"
    file.write_text(SWEEP)
    first = sweep(file, out, "--workers", "1")  # so that the first point is attacked first
    deadline = time.monotonic() + 250
    while not list(points.glob("noise-*/seed-0/*.partial")) and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.1)
    assert list(points.glob("noise-*/seed-0/*.partial"))
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    said = (tmp_path / "out.txt").read_text()
    assert said.index("Stopping Flower ...") < said.index("Interrupted; the same command goes on")
    (recording,) = points.glob("none/seed-0/train-*/recording")
    before, kept = Recording(recording).manifest.id, numbers(out, "none")
    assert len(kept) >= 4
    assert numbers(out, "noise") == []
    assert "Unfinished: 2 steps left" in (out / "sweep.html").read_text()

    alone = tmp_path / "alone"  # side by side, to save time
    two = ("--workers", "2")
    both = sweep(file, out, *two), sweep(file, alone, "--only", "noise-*", *two)
    assert [process.wait(timeout=400) for process in both] == [0, 0]
    assert Recording(recording).manifest.id == before
    assert numbers(out, "none") == kept
    assert numbers(alone, "noise") == numbers(out, "noise") != []
    assert not list(out.rglob("*.partial"))

"""What recording adds to a round of a real Flower simulation: LeNet, 10 clients.

One run records every other round, so that recorded and unrecorded rounds are measured
side by side; a round's time is the distance between two lines of the run's history.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from fl_privacy.settings import Scalar
from fl_privacy.simulation import simulate

CASES: dict[str, dict[str, Scalar]] = {
    "FedSGD, one image": {},
    "FedAvg, 240 images, batches of 32": {"algorithm": "fedavg", "batch-size": 32},
}


def round_seconds(settings: dict[str, Scalar], rounds: int) -> dict[int, float]:
    """Round -> seconds of a simulation that records odd rounds; the first two are left out."""
    recorded = ",".join(str(r) for r in range(1, rounds + 1, 2))
    config = {**settings, "num-server-rounds": rounds, "record-rounds": recorded}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        simulate(config, out=out, clients=10)
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in lines]
    return {r: ends[r] - ends[r - 1] for r in range(3, rounds + 1)}


def trimmed_mean(values: list[float]) -> float:
    """Mean of the middle 80 %: Flower polls ten times a second, so rounds come in steps."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def ratio_interval(recorded: list[float], plain: list[float]) -> tuple[float, float, float]:
    """Ratio of trimmed means with a 95 % bootstrap interval."""
    draw = random.Random(0)

    def resampled(values: list[float]) -> float:
        return trimmed_mean(draw.choices(values, k=len(values)))

    ratios = sorted(resampled(recorded) / resampled(plain) for _ in range(2000))
    return trimmed_mean(recorded) / trimmed_mean(plain), ratios[50], ratios[1950]


def main() -> None:
    """Print the added share of a round's time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=240)
    options = parser.parse_args()
    for name, settings in CASES.items():
        seconds = round_seconds(settings, options.rounds)
        recorded = [s for r, s in seconds.items() if r % 2]
        plain = [s for r, s in seconds.items() if not r % 2]
        ratio, low, high = ratio_interval(recorded, plain)
        print(
            f"{name}: recording adds {100 * (ratio - 1):+.1f} % "
            f"[{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}] to a round of "
            f"{1e3 * trimmed_mean(plain):.0f} ms (n = {len(recorded)} and {len(plain)} rounds)"
        )


if __name__ == "__main__":
    main()

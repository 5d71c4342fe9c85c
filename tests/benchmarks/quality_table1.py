"""Table 1 of Soteria: how close the server gets to what the dense layers see of each class.

100 clients of 40 images, 10 a round, 200 rounds, SGD 0.01, ``lenet5``, in the Flower
simulation; the recorded rounds are attacked with each reading of the algorithm. Prints the
mean Pearson correlation at FC1 / FC2 / FC3 (the inputs of the first, second and last dense
layer, with the parameters the client was sent; a missed class counts as 0) with its 95 %
interval over clients, a client counting once with the mean over its rounds. Beside it the
same inference against the true representation of the client's *other* class, and two guesses
that never look at an update: the mean representation of 2,000 test images, and that of those
of the class. A configuration that is finished in ``--out`` is not run again. Examples::

    python tests/benchmarks/quality_table1.py DATA/cifar10_20k.npz --out runs/table1
    python tests/benchmarks/quality_table1.py DATA/cifar10_20k.npz --out runs/table1 --pixels \\
        --only E1-B32 E10-B32 IID
"""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_privacy import component
from fl_privacy.analysis import analyze
from fl_privacy.attack_progress import attack_progress
from fl_privacy.metrics.statistics import Interval, mean_interval
from fl_privacy.plan import Plan
from fl_privacy.protocols import Dataset
from fl_privacy.round_progress import round_progress
from fl_privacy.simulation import simulate
from fl_privacy.threat_model import ThreatModel

AUXILIARY = 2000
LAYERS = ("fc1", "fc2", "fc3")
TRUTHS = ("own", "other")
CORRELATIONS = {
    (layer, of): f"representation_correlation(layer={layer!r}, truth={of!r})"
    for of in TRUTHS
    for layer in LAYERS
}
SHARES = ("class_precision", "class_recall")
ADVERSARIES = (
    "representation_inference(classes='rows')",
    "representation_inference",
    "representation_inference(pick='loudest')",
    "representation_inference(pick='own')",
    "representation_guess",
    "representation_guess(of='class')",
)


@dataclass(frozen=True)
class Setting:
    """A row of the table, and what was published."""

    epochs: int
    batch_size: int
    classes: int
    published: str

    @property
    def partition(self) -> str:
        """40 images a client, equally many of each of its classes."""
        return f"classes-by-samples(classes={self.classes}, samples={40 // self.classes})"


SETTINGS = {
    "E1-B32": Setting(1, 32, 2, ".98 / .99 / .99"),
    "E5-B32": Setting(5, 32, 2, ".82 / .90 / .92"),
    "E10-B32": Setting(10, 32, 2, ".70 / .78 / .82"),
    "E1-B16": Setting(1, 16, 2, ".82 / .93 / .99"),
    "E1-B8": Setting(1, 8, 2, ".85 / .89 / .92"),
    "IID": Setting(1, 32, 10, ".48 / .31 / .18"),
}


def federate(out: Path, dataset: str, setting: Setting, options: argparse.Namespace) -> None:
    """Run a federation into ``out``, which exists only when it has got to its end."""
    if out.exists():
        return
    unfinished = out.with_name(f"{out.name}-unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    attacked = [1, *range(options.every, options.rounds + 1, options.every)]
    config = {
        "dataset": dataset,
        "model": "lenet5",
        "partition": setting.partition,
        "algorithm": "fedavg",
        "num-server-rounds": options.rounds,
        "fraction-train": 0.1,
        "lr": 0.01,
        "local-epochs": setting.epochs,
        "batch-size": setting.batch_size,
        "seed": options.seed,
        "audit": True,
        "record-rounds": ",".join(map(str, attacked)),
        "eval-samples": 1000,
    }
    with round_progress(verbose=False) as stream:
        simulate(config, out=unfinished, clients=100, stream=stream)
    for truth in (unfinished / "truth").glob("*/*"):  # of rounds that are not recorded: gigabytes
        if int(truth.name) not in attacked:
            shutil.rmtree(truth)
    unfinished.rename(out)


def auxiliary(folder: Path, dataset: str) -> str:
    """Test images, which no client has, as the test split that the guesses hold."""
    source: Dataset = component.create("datasets", dataset)
    held, settings = source.load("test", torch.arange(AUXILIARY)), component.parse(dataset)[1]
    x, y = held.inputs.numpy(), held.labels.numpy()
    path = folder / "auxiliary.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    settings["path"] = str(path)
    return f"npz({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def attacked(run: Path, adversary: str, held: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one adversary."""
    guessing = adversary.startswith("representation_guess")
    plan = Plan(
        adversary=adversary,
        threat_model=ThreatModel(auxiliary=held if guessing else ""),
        metrics=(*CORRELATIONS.values(), *SHARES),
        seed=seed,
        device="cpu",
    )
    with attack_progress(adversary) as progress:
        return analyze(run, plan, progress=progress).rows()


def over_clients(rows: Sequence[Mapping[str, Any]], score: str) -> Interval:
    """Mean over clients, each with the mean over its rounds, and the interval of it."""
    clients: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[score] is not None:
            clients[row["node"]].append(row[score])
    return mean_interval(float(np.mean(values)) for values in clients.values())


def line(name: str, adversary: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One row of a Markdown table."""

    def told(of: str) -> str:
        found = [over_clients(rows, CORRELATIONS[layer, of]) for layer in LAYERS]
        return " / ".join(f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]" for s in found)

    own, other = told("own"), told("other")
    shares = " / ".join(f"{100 * over_clients(rows, score).mean:.0f}" for score in SHARES)
    clients = len({row["node"] for row in rows})
    return f"| {name} | `{adversary}` | {own} | {other} | {shares} | {len(rows)} / {clients} |"


def curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean correlations by round."""
    rounds = sorted({row["round"] for row in rows})
    cells = []
    for number in rounds:
        own = [
            mean_interval(r[CORRELATIONS[layer, "own"]] for r in rows if r["round"] == number).mean
            for layer in LAYERS
        ]
        cells.append(f"{number}: {' / '.join(f'{value:.2f}' for value in own)}")
    return "; ".join(cells)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CIFAR-10 as an .npz file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="*", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--pixels", action="store_true", help="the network sees pixels of 0 to 1")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="attack round 1 and every such one")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, attack, print."""
    options = parsed()
    path = str(options.data.absolute())
    dataset = f"npz(path={path!r}{', normalize=False' if options.pixels else ''})"
    out = options.out.absolute() / ("pixels" if options.pixels else "normalized")
    out.mkdir(parents=True, exist_ok=True)
    held = auxiliary(out, dataset)
    columns = (
        "setting",
        "adversary",
        "own class FC1 / FC2 / FC3 [95 %]",
        "other class FC1 / FC2 / FC3 [95 %]",
        "classes: precision / recall, %",
        "updates / clients",
    )
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|", flush=True)
    curves = []
    for name in options.only:
        setting = SETTINGS[name]
        run = out / f"{name}-R{options.rounds}-seed{options.seed}"
        federate(run, dataset, setting, options)
        print(f"| {name} | published | {setting.published} | | | |")
        for adversary in ADVERSARIES:
            rows = attacked(run, adversary, held, options.seed)
            print(line(name, adversary, rows), flush=True)
            if adversary.startswith("representation_inference"):
                curves.append(f"{name}, {adversary}, by round: {curve(rows)}")
    print("", *curves, sep="\n")


if __name__ == "__main__":
    main()

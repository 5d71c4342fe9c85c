"""Fig. 3 of Soteria: which part of a gradient gives an image away.

One image a batch on ``lenet-zhu``: the whole gradient, that of the convolutions alone, and the
inferred representation alone, each matched by an attack of its own. Prints MSE and PSNR with
their 95 % intervals over the targets, beside the guesses, and draws the first eight targets
(drawn by the seed, not chosen) as a strip, SVG or PNG by the name. Run it as a module::

    python -m tests.benchmarks.quality_fig3 DATA/cifar10_20k.npz --strip fig3-cifar10.svg
    python -m tests.benchmarks.quality_fig3 DATA/mnist.npz --strip fig3-mnist.png \\
        --attack "gradient_similarity(iterations=4800)"
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from fl_privacy import component
from fl_privacy.analysis import analyze
from fl_privacy.attack_command import failures
from fl_privacy.attack_progress import attack_progress
from fl_privacy.metrics.matching import in_unit_range, pixels
from fl_privacy.metrics.statistics import mean_interval
from fl_privacy.plan import METRICS, Plan
from fl_privacy.protocols import Dataset
from fl_privacy.recording import Recording
from fl_privacy.results import ResultSet
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import Task
from tests.benchmarks.quality_inversion import auxiliary, dataset_of, record, trained

SHOWN = 8
GUESSES = ("baseline", "baseline(guess='constant')")


def parts(attack: str, representation: str) -> dict[str, str]:
    """Name of a part of the gradient -> the adversary that matches it."""
    name, settings = component.parse(attack)

    def matching(layers: str) -> str:
        return component.spec_of(
            "adversaries", component.create("adversaries", name, {**settings, "layers": layers})
        )

    return {
        "whole gradient": matching("all"),
        "convolutions only": matching("convolutions"),
        "representation only": representation,
    }


def line(part: str, adversary: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One row of a Markdown table."""
    scored = [row for row in rows if row["status"] != "failed"]
    mse, psnr = (mean_interval(row[name] for row in scored) for name in ("mse", "psnr"))
    seconds = sum(row["seconds"] or 0.0 for row in scored)
    return (
        f"| {part} | `{adversary}` | {mse.mean:.4f} [{mse.low:.4f}, {mse.high:.4f}] | "
        f"{psnr.mean:.1f} [{psnr.low:.1f}, {psnr.high:.1f}] | {mse.n} | "
        f"{len(rows) - len(scored)} | {seconds:.0f} |"
    )


def originals(run: Path, task: Task) -> dict[str, Tensor]:
    """Key of a target -> its image, for the first ones in the order of recording."""
    vault = TruthVault(run / "truth")
    observed = ThreatModel().observe(Recording(run / "recording"))[:SHOWN]
    held = {o.key: vault.samples(o.exchanges) for o in observed}
    return {key: pixels(in_unit_range(samples, task).inputs)[0] for key, samples in held.items()}


def strip(truth: Mapping[str, Tensor], made: Mapping[str, ResultSet], task: Task) -> Figure:
    """A row a part of the gradient under the originals, a column a target."""
    figure = Figure(figsize=(1.2 + 0.75 * len(truth), 0.75 * (1 + len(made))), dpi=200)
    axes = figure.subplots(1 + len(made), len(truth), squeeze=False)
    for row, name in zip(axes, ("original", *made), strict=True):
        row[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        for cell, (key, image) in zip(row, truth.items(), strict=True):
            cell.set(xticks=[], yticks=[])
            cell.set_frame_on(False)
            found = None if name == "original" else made[name].reconstruction(key)
            shown = image if name == "original" else None
            if found is not None:
                shown = pixels(in_unit_range(found, task).inputs)[0]
            if shown is not None:
                cell.imshow(shown.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    figure.subplots_adjust(left=1.1 / (1.2 + 0.75 * len(truth)), right=1, bottom=0, top=1)
    return figure


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="an .npz file, or the name of a dataset")
    parser.add_argument("--attack", default="dlg", help="what matches gradients")
    parser.add_argument("--representation", default="representation")
    parser.add_argument("--model", default="lenet-zhu")
    parser.add_argument("--train", type=int, default=0, help="epochs of training before the round")
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strip", type=Path, help="file to draw the first targets in")
    given = parser.parse_args()
    one = {"images": 1, "algorithm": "fedsgd", "epochs": 1, "batch_size": 1, "lr": 0.1}
    return argparse.Namespace(**vars(given), **one, order="sequential", batch_norm="train")


def main() -> None:
    """Record, attack, print, draw."""
    options = parsed()
    dataset = dataset_of(options.data)
    source: Dataset = component.create("datasets", dataset)
    network = component.create("models", options.model).build(source.task(), seed=options.seed)
    network = trained(network, source, options.train, options.seed)
    attacks = parts(options.attack, options.representation)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        record(run, dataset, network, options)
        held = auxiliary(dataset, run)
        print("| matched | adversary | MSE [95 %] | PSNR dB [95 %] | n | failed | s |")
        print("|---" * 7 + "|")
        made: dict[str, ResultSet] = {}
        for part, adversary in [*((g, g) for g in GUESSES), *attacks.items()]:
            known = ThreatModel(auxiliary=held if part in GUESSES else "")
            plan = Plan(adversary=adversary, threat_model=known, seed=options.seed, metrics=METRICS)
            with attack_progress(adversary) as progress:
                result = analyze(run, plan, progress=progress)
            print(
                line("nothing" if part in GUESSES else part, adversary, result.rows()), flush=True
            )
            for why, count in failures(result).items():
                print(f"{count} failed: {why}")
            if part in attacks:
                made[part] = result
        if options.strip:
            strip(originals(run, source.task()), made, source.task()).savefig(options.strip)


if __name__ == "__main__":
    main()

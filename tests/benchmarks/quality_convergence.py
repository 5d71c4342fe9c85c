"""Does FedAvg with Soteria converge, and what does theorem 2 say? The setting of Fig. 7.

Logistic regression on images of an ``.npz`` file (the paper: MNIST), 100 devices with 100 images
of each of two classes, batch 32, E local steps, K devices a round drawn without replacement,
SGD 0.01 as in section 6.3 of Soteria (CVPR 2021) and the theorem's decaying step, with and
without Soteria (50 of 784 features; the features are the input, so the score is its size).

A step is plain tensor algebra over all seeds, devices and arms at once; one of them is
compared with ``local_train`` and the real ``soteria`` first. Writes FILE.csv (curves),
FILE.json (constants, final losses), FILE.svg and FILE.png, and prints final losses with 95 %
intervals over the seeds (of devices and batches; the partition is that of seed 0), the bound,
and the point at which the mean pruned gradient vanishes. Example::

    python tests/benchmarks/quality_convergence.py DATA/mnist.npz --rounds 200 --out fig7
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import NoConvergence, newton_krylov
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from torch.nn import functional as F

from clients.defenses.soteria import Soteria
from clients.training import local_train
from fl_privacy import component
from fl_privacy.convergence import Assumptions, bound, step_size, steps_until
from fl_privacy.metrics.statistics import mean_interval
from fl_privacy.models.logistic import Logistic
from fl_privacy.protocols import Dataset, Partition
from fl_privacy.seeding import generator
from fl_privacy.softmax_regression import Federation, gradients, losses, measured, minimum
from fl_privacy.types import LocalTraining, Samples

DEVICES = 100
ARMS = (
    ("FedAvg, constant step", False, False),
    ("FedAvg + Soteria, constant step", True, False),
    ("FedAvg, theorem's step", False, True),
    ("FedAvg + Soteria, theorem's step", True, True),
)
"""Name, whether gradients are pruned, whether the step decays."""

COLORS = ("#3b6fb6", "#c8553d")


@dataclass(frozen=True)
class Setting:
    """One panel: E local steps, K devices a round."""

    local_steps: int
    participants: int

    def __str__(self) -> str:
        return f"E = {self.local_steps}, K = {self.participants}"


@dataclass(frozen=True)
class Curves:
    """Losses ``[arms, seeds, points]`` after ``rounds [points]``, the first seed's last weights."""

    rounds: list[int]
    losses: Tensor
    visited: list[Tensor]


def federation_of(source: Dataset, options: argparse.Namespace) -> tuple[Federation, list[Tensor]]:
    """All devices' normalized inputs with a constant 1, and the indices of their images."""
    task = source.task()
    partition: Partition = component.create("partitions", options.partition)
    labels = source.labels("train")
    held = [partition.indices(labels, k, DEVICES, seed=0) for k in range(DEVICES)]
    least = min(map(len, held))
    held = [indices[:least] for indices in held]
    samples = source.load("train", torch.cat(held))
    inputs = task.normalize(samples.inputs).flatten(1)
    order = inputs.abs().argsort(dim=1, descending=True, stable=True)
    keep = torch.ones_like(inputs, dtype=torch.bool).scatter(1, order[:, : options.pruned], False)
    one = torch.ones(len(inputs), 1)
    return (
        Federation(
            features=torch.cat([inputs, one], 1).view(DEVICES, least, -1),
            labels=samples.labels.view(DEVICES, least),
            keep=torch.cat([keep, one.bool()], 1).view(DEVICES, least, -1),
            classes=task.classes,
            mu=options.mu,
        ),
        held,
    )


def precise(federation: Federation) -> Federation:
    """The same in float64."""
    return Federation(
        federation.features.double(),
        federation.labels,
        federation.keep,
        federation.classes,
        federation.mu,
    )


def sgd_step(
    weights: Tensor, inputs: Tensor, seen: Tensor, labels: Tensor, lr: Tensor, mu: float
) -> Tensor:
    """One step of ``weights [..., classes, d]`` on batches ``inputs [..., n, d]``.

    ``seen`` is what the weight gradient sees of the inputs: all of them, or the unpruned part.
    """
    delta = (inputs @ weights.mT).softmax(-1) - F.one_hot(labels, weights.shape[-2]).to(inputs)
    gradient = delta.mT @ seen / inputs.shape[-2]
    return weights - lr * (gradient + mu * weights)


def check_step(source: Dataset, federation: Federation, options: argparse.Namespace) -> float:
    """Largest difference between `sgd_step` and ``local_train`` with Soteria, of one step."""
    task, batch = source.task(), min(4, options.batch_size)
    partition: Partition = component.create("partitions", options.partition)
    held = partition.indices(source.labels("train"), 0, DEVICES, seed=0)[:batch]
    samples: Samples = source.load("train", held)
    model = Logistic(start="random").build(task, seed=0)
    weight, bias = (p.detach().clone() for p in model.parameters())
    rate = options.pruned / math.prod(task.input_shape)
    defense = Soteria(layer="classifier", rate=rate, of="all")
    training = LocalTraining(
        algorithm="fedsgd", lr=options.lr, weight_decay=options.mu, batch_size=batch,
        order="sequential",
    )  # fmt: skip
    result = local_train(
        model, task, samples, training, generator=generator(0),
        gradient_defense=defense, defense_generator=generator(0),
    )  # fmt: skip
    x, keep = federation.features[0, :batch], federation.keep[0, :batch]
    before = torch.cat([weight, bias[:, None]], 1)
    lr = torch.tensor(options.lr)
    mine = sgd_step(before, x, x * keep, federation.labels[0, :batch], lr, options.mu)
    theirs = torch.cat(
        [result.state["classifier.weight"], result.state["classifier.bias"][:, None]], 1
    )
    return float((mine - theirs).abs().max() / (theirs - before).abs().max())


def simulate(
    federation: Federation, setting: Setting, assumed: Assumptions, options: argparse.Namespace
) -> Curves:
    """All arms and seeds of one panel; arms share devices and batches, seed by seed."""
    shape = (len(ARMS), options.seeds, federation.classes, federation.features.shape[2])
    weights = torch.zeros(shape)
    prunes = torch.tensor([arm[1] for arm in ARMS]).view(-1, 1, 1, 1, 1)
    draws = [generator(seed, "devices", str(setting)) for seed in range(options.seeds)]
    points, curves = [0], [mean_losses(federation, weights)]
    done = 0
    for number in range(1, options.rounds + 1):
        chosen = torch.stack(
            [torch.randperm(DEVICES, generator=g)[: setting.participants] for g in draws]
        )
        local = weights.unsqueeze(2).expand(-1, -1, setting.participants, -1, -1)
        for _ in range(setting.local_steps):
            x, kept, labels = batches(federation, chosen, draws, options.batch_size)
            seen = torch.where(prunes, x * kept, x)
            lr = rates(assumed, setting.local_steps, done, options.lr)
            local = sgd_step(local, x, seen, labels, lr, federation.mu)
            done += 1
        weights = local.mean(2)  # all devices hold as many samples
        if number % options.every == 0 or number == options.rounds:
            points.append(number)
            curves.append(mean_losses(federation, weights))
    return Curves(points, torch.stack(curves, 2), [*weights[:, 0].double()])


def batches(
    federation: Federation, chosen: Tensor, draws: Sequence[torch.Generator], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One random batch of each chosen device: inputs, mask, labels ``[seeds, devices, n, ...]``."""
    n = federation.labels.shape[1]
    places = torch.stack(
        [
            torch.stack([torch.randperm(n, generator=g)[:size] for _ in devices])
            for g, devices in zip(draws, chosen, strict=True)
        ]
    )
    at = (chosen.unsqueeze(2), places)
    return federation.features[at], federation.keep[at], federation.labels[at]


def rates(assumed: Assumptions, local_steps: int, t: int, constant: float) -> Tensor:
    """The arms' steps, ``[arms, 1, 1, 1, 1]``."""
    decaying = step_size(assumed, local_steps, t)
    return torch.tensor([decaying if arm[2] else constant for arm in ARMS]).view(-1, 1, 1, 1, 1)


def mean_losses(federation: Federation, weights: Tensor) -> Tensor:
    """F at each of ``weights [arms, seeds, classes, d]``: ``[arms, seeds]``."""
    flat = weights.flatten(0, 1)
    x = federation.features.flatten(0, 1)
    logits = (x @ flat.flatten(0, 1).T).view(len(x), *flat.shape[:2]).permute(1, 2, 0)
    labels = federation.labels.flatten().expand(len(flat), -1)
    entropy = F.cross_entropy(logits, labels, reduction="none").mean(1)
    penalty = federation.mu / 2 * flat.square().sum((1, 2))
    return (entropy + penalty).view(weights.shape[:2]).double()


def resting_point(federation: Federation, start: Tensor) -> Tensor | None:
    """Where the mean pruned gradient vanishes: what decaying steps end at; None if not found."""
    x = federation.features.flatten(0, 1)
    pruned = x * federation.keep.flatten(0, 1)
    curvature = x.T @ pruned / (2 * len(x)) + federation.mu * torch.eye(x.shape[1], dtype=x.dtype)
    solver = torch.linalg.inv(curvature)

    def mean(flat: Any) -> Any:
        weights = torch.from_numpy(flat).view_as(start)
        return gradients(federation, weights, pruned=True).mean(0).flatten().numpy()

    def precondition(flat: Any) -> Any:
        return (torch.from_numpy(flat).view_as(start) @ solver).flatten().numpy()

    n = start.numel()
    inner = LinearOperator((n, n), matvec=precondition, dtype=np.float64)
    try:
        found = newton_krylov(
            mean, start.flatten().numpy(), inner_M=inner, f_tol=1e-5, maxiter=40, method="gmres"
        )
    except NoConvergence:
        return None
    return torch.from_numpy(found).view_as(start)


def figure(
    panels: Mapping[Setting, Curves],
    assumed: Assumptions,
    lines: Mapping[str, float],
    batch: int,
) -> Figure:
    """A panel for each setting: losses below, the bound of theorem 2 above on a log axis."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": "fig7"})
    drawn = Figure(figsize=(7.2, 6.4), layout="constrained")
    blocks = drawn.subfigures(2, math.ceil(len(panels) / 2), squeeze=False)
    for (setting, curves), block in zip(panels.items(), blocks.T.flat, strict=False):
        above, below = block.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
        above.set_title(f"{setting}, batch {batch}", fontsize=9)
        draw_bounds(above, setting, curves.rounds, assumed)
        draw_losses(below, curves, lines)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    below = blocks[0, 0].get_axes()[1]
    drawn.legend(
        *below.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return drawn


def draw_bounds(axes: Axes, setting: Setting, rounds: Sequence[int], assumed: Assumptions) -> None:
    """The bound on F(w_T) - F*, with and without Soteria."""
    for color, kept in zip(COLORS, (without_pruning(assumed), assumed), strict=True):
        values = [bound_at(kept, setting, number) for number in rounds]
        axes.plot(rounds, values, color=color, linewidth=1.2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.set_ylabel("bound of\nF − F* (log)")


def draw_losses(axes: Axes, curves: Curves, lines: Mapping[str, float]) -> None:
    """Mean loss over the seeds and their range, arm by arm, and levels to compare with."""
    for (name, prunes, decays), of_arm in zip(ARMS, curves.losses, strict=True):
        color, line = COLORS[prunes], "--" if decays else "-"
        low, high = of_arm.amin(0).tolist(), of_arm.amax(0).tolist()
        axes.fill_between(curves.rounds, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(curves.rounds, of_arm.mean(0).tolist(), line, color=color, lw=1.2, label=name)
    for (name, level), line in zip(lines.items(), (":", "-."), strict=False):
        if math.isfinite(level):
            axes.axhline(level, color="#555555", linewidth=0.8, linestyle=line, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("training loss F")


def without_pruning(assumed: Assumptions) -> Assumptions:
    """The constants of plain FedAvg."""
    return Assumptions(**{**asdict(assumed), "pruned": 0, "column": 0.0})


def bound_at(assumed: Assumptions, setting: Setting, rounds: int) -> float:
    """Theorem 2 after ``rounds`` rounds."""
    return bound(
        assumed,
        local_steps=setting.local_steps,
        participants=setting.participants,
        steps=rounds * setting.local_steps,
    )


def tell(
    panels: Mapping[Setting, Curves], assumed: Assumptions, lowest: float, floor: float
) -> list[dict[str, Any]]:
    """Print final losses and bounds of each panel; the same as records."""
    print("| panel | arm | final loss F [95 %] | F - F* | bound | bound < F(w_1) - F* after |")
    print("|---|---|---|---|---|---|")
    records = []
    for setting, curves in panels.items():
        for (name, prunes, decays), of_arm in zip(ARMS, curves.losses, strict=True):
            kept = assumed if prunes else without_pruning(assumed)
            final = mean_interval(of_arm[:, -1].tolist())
            start = float(of_arm[0, 0]) - lowest
            limit = {"local_steps": setting.local_steps, "participants": setting.participants}
            record = {
                "panel": str(setting), "arm": name, "n": final.n, "loss": final.mean,
                "low": final.low, "high": final.high, "excess": final.mean - lowest,
                "bound": bound_at(kept, setting, curves.rounds[-1]) if decays else None,
                "steps_until_not_vacuous": steps_until(kept, **limit, level=start),
                "steps_until_below_resting_point": (
                    steps_until(kept, **limit, level=floor) if prunes and floor > 0 else None
                ),
            }  # fmt: skip
            records.append(record)
            told = (
                f"{record['bound']:.3g} | {record['steps_until_not_vacuous']:.2g} steps"
                if decays
                else "none (constant step) | "
            )
            print(
                f"| {setting} | {name} | {final.mean:.4f} [{final.low:.4f}, {final.high:.4f}] | "
                f"{final.mean - lowest:.4f} | {told} |"
            )
    return records


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="an .npz file, or the name of a dataset")
    parser.add_argument("--out", type=Path, default=Path("convergence"), help="files to write")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=4, help="rounds between evaluations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--local-steps", type=int, nargs="+", default=[5, 10], help="E")
    parser.add_argument("--participants", type=int, nargs="+", default=[5, 10], help="K")
    parser.add_argument("--pruned", type=int, default=50, help="features of a sample to prune")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01, help="the constant step")
    parser.add_argument("--mu", type=float, default=0.01, help="L2 penalty (weight decay)")
    parser.add_argument("--partition", default="classes-by-samples")
    return parser.parse_args()


def flower_command(dataset: str, options: argparse.Namespace, rate: float) -> str:
    """The nearest run in Flower's simulation: E epochs instead of E steps, constant step."""
    return (
        f"fl-privacy simulate --out runs/fig7 --clients {DEVICES} --rounds {options.rounds} "
        f'--dataset "{dataset}" --model logistic --partition {options.partition} '
        f"--algorithm fedavg --epochs 5 --batch-size {options.batch_size} --lr {options.lr} "
        f"--set weight-decay={options.mu} --set fraction-train=0.1 "
        f"--defense \"soteria(layer='classifier', rate={rate!r}, of='all')\""
    )


def write(
    out: Path, panels: Mapping[Setting, Curves], drawn: Figure, facts: Mapping[str, Any]
) -> None:
    """The four files."""
    with out.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("local_steps", "participants", "arm", "seed", "round", "loss"))
        for setting, curves in panels.items():
            for (name, *_), of_arm in zip(ARMS, curves.losses.tolist(), strict=True):
                for seed, values in enumerate(of_arm):
                    table.writerows(
                        (setting.local_steps, setting.participants, name, seed, number, value)
                        for number, value in zip(curves.rounds, values, strict=True)
                    )
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    drawn.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    drawn.savefig(out.with_suffix(".png"), dpi=150)


def main() -> None:
    """Simulate, measure, print, draw."""
    options, start = parsed(), time.perf_counter()
    path = Path(options.data).absolute()
    dataset = f"npz(path={str(path)!r})" if path.exists() else options.data
    source: Dataset = component.create("datasets", dataset)
    federation, _ = federation_of(source, options)
    apart = check_step(source, federation, options)
    print(f"one step differs from local_train with Soteria by {apart:.1e} of its largest entry")
    whole = precise(federation)
    best, lowest, excess = minimum(whole, each=False)
    _, each, each_excess = minimum(whole, each=True)
    gap = float(lowest - each.mean())
    print(
        f"F* = {float(lowest):.5f} (excess below {excess:.1g}), Gamma = {gap:.4f} "
        f"(to {each_excess:.1g}); {time.perf_counter() - start:.0f} s"
    )
    zero = torch.zeros_like(best[0])
    assumed = measured(whole, [zero, best[0]], batch=options.batch_size, best=best[0], gap=gap)
    settings = [Setting(e, k) for e in options.local_steps for k in options.participants]
    panels = {s: simulate(federation, s, assumed, options) for s in settings}
    visited = [zero, best[0], *(w for curves in panels.values() for w in curves.visited)]
    assumed = measured(whole, visited, batch=options.batch_size, best=best[0], gap=gap)
    print(f"simulated; {time.perf_counter() - start:.0f} s")
    rest = resting_point(whole, best[0])
    floor = math.nan if rest is None else float(losses(whole, rest).mean() - lowest)
    records = tell(panels, assumed, float(lowest), floor)
    print(
        f"\nthe mean pruned gradient vanishes where F - F* = {floor:.4g}: Soteria's bound, which "
        f"tends to 0, is below that after the steps in steps_until_below_resting_point"
    )
    constants = {**asdict(assumed), "variances": max(assumed.variances), "weights": 1 / DEVICES}
    print(json.dumps(constants))
    lines = {"least loss F*": float(lowest), "mean pruned gradient is 0": float(lowest) + floor}
    drawn = figure(panels, assumed, lines, options.batch_size)
    facts = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "constants": constants,
        "lowest": float(lowest),
        "resting_excess": floor,
        "results": records,
    }
    write(options.out, panels, drawn, facts)
    print(flower_command(dataset, options, options.pruned / math.prod(source.task().input_shape)))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

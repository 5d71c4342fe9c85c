"""Soteria's scores, exact and sketched, beside the authors' kind of loop; what a step costs.

The loop takes one full backward pass a feature, gradients of the weights included, for every
feature of one image; where that takes minutes, a part of the features is timed, evenly spread
over all of them, and extrapolated. The slopes that the loop does compute, and the pruned
features of those, are compared with the exact ones. Everything is measured in alternation in one
process, and the ratios are of medians. Overlap is the share of the features that exact scores
prune (40 % of the active ones) which a sketch prunes too; that of pruning by the size of the
feature alone, without any slope, stands beside it. Images are random low-frequency pictures
unless an .npz file is named. Run by `make bench`, or with options::

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_soteria.py --quick --only lenet512

``--train`` adds what the number of probes does to accuracy: a small network trained on
fashion-mini with each, with exact scores and without a defense, over three seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.defending import set_gradient, step_of
from clients.defenses.soteria import Soteria, kept
from clients.defenses.soteria_layer import DenseLayer, features_of, find_layer
from clients.defenses.soteria_scores import costs
from clients.training import evaluate_model, local_train
from fl_privacy import component
from fl_privacy.models.building import initialization, output_features
from fl_privacy.protocols import Dataset
from fl_privacy.seeding import generator
from fl_privacy.types import LocalTraining, Samples, Step, Task

CIFAR = Task(input_shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
PROBES = (2, 4, 8, 16, 32, 64, 96, 128)
LAYER = "classifier"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """One network; ``looped`` features of it are timed in the authors' loop."""

    network: str
    features: int
    looped: int
    precision: tuple[str, ...]


SETTINGS = (
    Setting("lenet512", 512, 512, ("full",)),
    Setting("convnet64", 2304, 36, ("full", "bfloat16")),
)


@dataclass(frozen=True)
class Bench:
    """What is measured, on what, and how."""

    setting: Setting
    model: nn.Module
    step: Step
    layer: DenseLayer
    repeats: int
    clock: Clock

    def seconds(self, call: Callable[[], object]) -> float:
        """Time of one call."""
        start = self.clock()
        call()
        return self.clock() - start

    def medians(self, *calls: Callable[[], object]) -> list[float]:
        """Median times of ``calls``, taken in turn."""
        rounds = [[self.seconds(call) for call in calls] for _ in range(self.repeats)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def lenet512(task: Task) -> nn.Module:
    """The convolutions of LeNet-5 with ReLU and max-pools, FC 512, the classifier."""
    with initialization(0):
        model = nn.Sequential()
        channels = task.input_shape[0]
        for i, out in enumerate((6, 16), start=1):
            model.add_module(f"conv{i}", nn.Conv2d(channels, out, 5))
            model.add_module(f"relu{i}", nn.ReLU())
            model.add_module(f"pool{i}", nn.MaxPool2d(2))
            channels = out
        model.add_module("flatten", nn.Flatten())
        model.add_module("dense1", nn.Linear(output_features(model, task), 512))
        model.add_module("relu3", nn.ReLU())
        model.add_module("classifier", nn.Linear(512, task.classes))
    return model


def pictures(count: int, data: str) -> Samples:
    """Test images of an .npz file, or random low-frequency pictures, which need no download."""
    if data:
        source: Dataset = component.create("datasets", f"npz(path={data!r})")
        return source.load("test", torch.arange(count))
    coarse = torch.rand(count, 3, 5, 5, generator=generator(0, "bench"))
    inputs = F.interpolate(coarse, size=32, mode="bicubic", align_corners=True).clamp(0, 1)
    return Samples(inputs, torch.arange(count) % 10)


def make(setting: Setting, options: argparse.Namespace) -> Bench:
    """The untrained network, batch norm in eval mode, and a step of it."""
    if setting.network == "lenet512":
        model = lenet512(CIFAR)
    else:
        model = component.create("models", setting.network).build(CIFAR, seed=0)
    samples = pictures(options.images, options.data)
    step = step_of(model.eval(), CIFAR, samples, expected_batch_size=options.images)
    clock = time.process_time if options.processor_time else time.perf_counter
    return Bench(setting, model, step, find_layer(step, LAYER), options.repeats, clock)


def loop(bench: Bench, image: int) -> Tensor:
    """Slopes of the timed features of one image, by whole backward passes: ``[looped]``."""
    seen: list[Tensor] = []
    module = bench.model.get_submodule(LAYER)
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = bench.step.inputs[image : image + 1].clone().requires_grad_(True)
    bench.model(x)
    handle.remove()
    norms = []
    for i in range(0, bench.setting.features, bench.setting.features // bench.setting.looped):
        target = torch.zeros_like(seen[0])
        target[:, i] = 1
        seen[0].backward(target, retain_graph=True)  # type: ignore[no-untyped-call]
        assert x.grad is not None
        norms.append(x.grad.norm())
        bench.model.zero_grad()
        x.grad = None
    return torch.stack(norms)


def pruned(values: Tensor, norms: Tensor) -> Tensor:
    """Which of the active features go at the rate of 40 %: ``[n, d]``."""
    active = values != 0
    return active & ~kept(costs(values, norms), active, 0.4, of="active")


def exact_beside_the_loop(bench: Bench) -> tuple[float, Tensor]:
    """Print their ratio and how far they agree; the loop's time an image, the exact slopes."""
    found: list[Tensor] = []
    truth: list[Tensor] = []
    one = replace(bench.step, inputs=bench.step.inputs[:1], labels=bench.step.labels[:1])
    defense, draws = Soteria(layer=LAYER), generator(0, "bench")
    looped, alone = bench.medians(
        lambda: found.append(loop(bench, 0)),
        lambda: truth.append(defense.norms(one, bench.layer, draws)),
    )
    setting = bench.setting
    image = looped * setting.features / setting.looped
    each = bench.seconds(lambda: truth.append(defense.norms(bench.step, bench.layer, draws)))
    each /= len(bench.step.inputs)
    print(
        f"\n{setting.network}: loop {1e3 * looped / setting.looped:.2f} ms a feature, "
        f"{image:.2f} s an image ({setting.looped} of {setting.features} features timed)\n"
        f"exact, first image {alone:.3f} s: {image / alone:.1f} times as fast; "
        f"{len(bench.step.inputs)} images {each:.3f} s each: {image / each:.1f} times"
    )
    agree(bench, found[-1], truth[-1])
    return image, truth[-1]


def agree(bench: Bench, found: Tensor, truth: Tensor) -> None:
    """Print the largest difference from the loop's slopes, and whether the masks are the same."""
    with torch.no_grad():
        values = features_of(bench.step, bench.layer)(bench.step.inputs[:1])
    chosen = slice(0, None, bench.setting.features // bench.setting.looped)
    values, ours = values[:, chosen], truth[:1, chosen]
    active = values != 0
    worst = float(((ours - found).abs() / found)[active].max())
    same = torch.equal(pruned(values, ours), pruned(values, found[None]))
    print(
        f"largest relative difference of slopes {worst:.0e}; the mask of the looped features is "
        f"{'the same' if same else 'NOT the same'}"
    )


def sketches(bench: Bench, image: float, truth: Tensor, probes: tuple[int, ...]) -> None:
    """Print cost and overlap for each number of probes, and what a step with them costs."""
    with torch.no_grad():
        values = features_of(bench.step, bench.layer)(bench.step.inputs)
    wanted, count = pruned(values, truth), len(values)
    spread = truth[values != 0].log().std()
    size = overlap(wanted, pruned(values, torch.ones_like(truth)))
    print(
        f"active {(values != 0).float().mean():.2f} of the features; spread of the logarithm of "
        f"slopes {spread:.2f}; overlap by size alone {size:.3f}\n"
        f"probes precision  overlap  shrunk  s/image  x loop  x step of {count}"
    )
    for precision in bench.setting.precision:
        for number in probes:
            settings = {"scores": "sketch", "probes": number, "precision": precision}
            plain = Soteria(layer=LAYER, **settings)
            shrunk = Soteria(layer=LAYER, shrink=True, **settings)
            shares = []
            for defense in (plain, shrunk):
                keep, active = defense.choose(bench.step, bench.layer, generator(number, "bench"))
                shares.append(overlap(wanted, active & ~keep))
            seconds, undefended, defended = bench.medians(*costing(bench, plain, shrunk))
            print(
                f"{number:6d} {precision:9s} {shares[0]:8.3f} {shares[1]:7.3f} "
                f"{seconds / count:8.4f} {image / (seconds / count):7.1f} "
                f"{defended / undefended:7.1f}"
            )


def costing(bench: Bench, plain: Soteria, shrunk: Soteria) -> Iterator[Callable[[], object]]:
    """The scores of all images, a step without and one with the defense (shrinking included)."""
    draws = generator(0, "bench")
    yield lambda: plain.norms(bench.step, bench.layer, draws)
    yield lambda: set_gradient(bench.step, None, None)
    yield lambda: set_gradient(bench.step, shrunk, draws)


def overlap(wanted: Tensor, got: Tensor) -> float:
    """Share of ``wanted`` that is in ``got``."""
    return float((wanted & got).sum() / wanted.sum())


def accuracies(probes: tuple[int, ...], seeds: int, epochs: int) -> None:
    """Print accuracy on fashion-mini after training with each kind of scores at rate 0.4."""
    source: Dataset = component.create("datasets", "fashion-mini")
    task, test = source.task(), source.load("test")
    train = source.load("train")
    training = LocalTraining(
        algorithm="fedavg", epochs=epochs, lr=0.05, batch_size=32, batch_norm="eval"
    )
    print(f"\nlenet512 on fashion-mini: {len(train)} images, {epochs} epochs, {seeds} seeds")
    sketch = [Soteria(layer=LAYER, scores="sketch", probes=number) for number in probes]
    for defense in (None, *sketch, Soteria(layer=LAYER)):
        found = []
        for seed in range(seeds):
            model = lenet512(task)
            draws = [generator(seed, stream) for stream in ("order", "defense")]
            local_train(
                model,
                task,
                train,
                training,
                generator=draws[0],
                gradient_defense=defense,
                defense_generator=draws[1],
            )
            found.append(100 * evaluate_model(model, task, test)[1])
        name = "none" if defense is None else f"{defense.scores} {defense.probes}"
        name = "exact" if name.startswith("exact") else name
        print(f"{name:12s} {statistics.mean(found):.2f} % (sd {statistics.stdev(found):.2f})")


def main() -> None:
    """Print the versions, then each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=32, help="of the sketch, and in a batch")
    parser.add_argument("--data", default="", help="absolute path of an .npz with 3x32x32 images")
    parser.add_argument("--only", default="", help="one network")
    parser.add_argument("--probes", type=int, nargs="+", default=PROBES)
    parser.add_argument("--quick", action="store_true", help="4 images, once")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a busy machine, with one thread"
    )
    parser.add_argument("--train", action="store_true", help="accuracies too")
    parser.add_argument("--epochs", type=int, default=3, help="of --train")
    options = parser.parse_args()
    if options.quick:
        options.images, options.repeats = min(options.images, 4), 1
    warnings.simplefilter("ignore")
    print(
        f"fl-privacy {component.VERSION}, torch {torch.__version__}, cpu "
        f"{torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}"
    )
    for setting in SETTINGS:
        if options.only in ("", setting.network):
            bench = make(setting, options)
            image, truth = exact_beside_the_loop(bench)
            sketches(bench, image, truth, tuple(options.probes))
    if options.train:
        accuracies(tuple(options.probes), 3, options.epochs)


if __name__ == "__main__":
    main()

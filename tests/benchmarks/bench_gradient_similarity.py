"""GS on LeNet, 32 targets of one 3x32x32 image: ours, a plain loop, and breaching.

All three minimize the same objective (cosine + total variation) by signed Adam in a box,
on the same targets, labels known. They are measured in alternation in one process; what
counts are the ratios of medians. Run by `make bench`, which puts breaching on the path.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.gradient_similarity import GradientSimilarity
from fl_privacy.metrics.images import psnr_each
from fl_privacy.models.zhu import LeNetZhu
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Observation, Reconstruction, Samples, Task

TASK = Task(input_shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
TRAINING = LocalTraining(lr=0.1)
TV = 2e-3
CPU = torch.device("cpu")


def smooth_pictures(count: int) -> Samples:
    """Random low-frequency pictures, which need no download."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator(0, "bench"))
    inputs = F.interpolate(coarse, size=32, mode="bicubic", align_corners=True).clamp(0, 1)
    return Samples(inputs, torch.arange(count) % 10)


def gradients_of(model: nn.Module, samples: Samples, i: int) -> list[Tensor]:
    """Loss gradient of one picture."""
    outputs = model(TASK.normalize(samples.inputs[i : i + 1]))
    loss = F.cross_entropy(outputs, samples.labels[i : i + 1])
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def observe(model: nn.Module, samples: Samples) -> list[Observation]:
    """The targets, recorded and observed as in a run."""
    layout = Layout.of(model)
    location = f"memory://bench-{uuid4().hex}"
    with RecordingWriter.open(
        location, Manifest(created="", task=TASK, local_training=TRAINING)
    ) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in model.state_dict().items()}, layout)
        for i in range(len(samples)):
            steps = zip(model.named_parameters(), gradients_of(model, samples, i), strict=True)
            writer.append(
                round=1,
                node=str(i),
                arrays={n: (p - TRAINING.lr * g).detach().numpy() for (n, p), g in steps},
                num_examples=1,
                global_digest=sent,
                layout=layout,
            )
    return ThreatModel().observe(Recording(location), model=lambda: LeNetZhu().build(TASK, seed=0))


def ours(observations: list[Observation], iterations: int) -> Tensor:
    """All targets in one batch; pixels ``[targets, 3, 32, 32]``."""
    attack = GradientSimilarity(iterations=iterations, tv=TV)
    results = attack.attack(observations, seed=0, device=CPU)
    return torch.cat([r.inputs for r in results if isinstance(r, Reconstruction)])


def plain_loop(model: nn.Module, samples: Samples, targets: range, iterations: int) -> Tensor:
    """One target after the other, as most code does it; gradient on the input only."""
    low, high = (TASK.normalize(torch.full(TASK.input_shape, v)) for v in (0.0, 1.0))
    parameters = list(model.parameters())
    found = []
    for i in targets:
        observed = gradients_of(model, samples, i)
        x = torch.randn(1, *TASK.input_shape, generator=generator(0, i)).requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        milestones = [iterations * k // 8 for k in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for _ in range(iterations):
            loss = F.cross_entropy(model(x), samples.labels[i : i + 1])
            simulated = torch.autograd.grad(loss, parameters, create_graph=True)
            dot = sum((a * b).sum() for a, b in zip(simulated, observed, strict=True))
            norms = sum(a.square().sum() for a in simulated) * sum(
                b.square().sum() for b in observed
            )
            variation = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
            objective = 1 - dot / torch.as_tensor(norms).sqrt() + TV * variation
            (slope,) = torch.autograd.grad(objective, [x])
            x.grad = slope.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, low), high))
        found.append(TASK.denormalize(x.detach()))
    return torch.cat(found)


def breaching_loop(
    model: nn.Module, samples: Samples, targets: range, iterations: int
) -> Tensor | None:
    """breaching's invertinggradients attack, one target after the other; None if missing."""
    try:
        import breaching  # type: ignore[import-not-found]
    except ImportError:
        return None
    config = breaching.get_attack_config("invertinggradients")
    config.optim.max_iterations = iterations
    config.optim.callback = iterations + 1
    config.regularization.total_variation.scale = TV
    setup = {"device": CPU, "dtype": torch.float32}
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
    metadata = SimpleNamespace(
        shape=TASK.input_shape,
        classes=10,
        mean=TASK.mean,
        std=TASK.std,
        modality="vision",
        task="classification",
    )
    payload = {
        "parameters": [p.detach() for p in model.parameters()],
        "buffers": [],
        "metadata": metadata,
    }
    found = []
    for i in targets:
        shared = {
            "gradients": gradients_of(model, samples, i),
            "buffers": None,
            "metadata": {
                "num_data_points": 1,
                "labels": samples.labels[i : i + 1],
                "local_hyperparams": None,
            },
        }
        torch.manual_seed(i)
        result, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
        found.append(TASK.denormalize(result["data"].detach()))
    return torch.cat(found)


def timed(run: Callable[[], Tensor | None]) -> tuple[float, Tensor | None]:
    """Seconds and result, with the peer's chatter swallowed."""
    with redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result


def main() -> None:
    """Print target-iterations a second and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=150, help="in each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quality", type=int, default=0, help="iterations for a PSNR, 0: none")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    samples = smooth_pictures(32)
    model = LeNetZhu().build(TASK, seed=0)
    observations = observe(model, samples)

    def runs(iterations: int, few: range) -> dict[str, tuple[int, Callable[[], Tensor | None]]]:
        return {
            "ours": (32, lambda: ours(observations, iterations)),
            "loop": (len(few), lambda: plain_loop(model, samples, few, iterations)),
            "breaching": (len(few), lambda: breaching_loop(model, samples, few, iterations)),
        }

    versions: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print("GS, LeNet, 32 targets, 3x32x32,", versions)
    rates: dict[str, list[float]] = {}
    for repeat in range(options.repeats + 1):
        for name, (count, run) in runs(options.iterations, range(4)).items():
            seconds, result = timed(run)
            if repeat and result is not None:  # the first round warms up
                rates.setdefault(name, []).append(count * options.iterations / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:10s} {rate:9.0f} target-iterations/s  {1e3 / rate:6.3f} ms each")
    for name in ("loop", "breaching"):
        if name in medians:
            print(f"ours / {name}: {medians['ours'] / medians[name]:.1f}")
        else:
            print(f"{name} is not installed: run `make bench`")
    if options.quality:
        for name, (count, run) in runs(options.quality, range(32)).items():
            _, result = timed(run)
            if result is not None:
                values = psnr_each(result.clamp(0, 1), samples.inputs[:count])
                print(f"{name}: PSNR {values.mean():.1f} dB at {options.quality} iterations")


if __name__ == "__main__":
    main()

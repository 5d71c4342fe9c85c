"""GS on LeNet and ConvNet, one 3x32x32 image a target: ours, a plain loop, and breaching.

All three minimize the same objective (cosine + total variation) by signed Adam in a box,
on the same targets, labels known. They are measured in alternation in one process; what
counts are the ratios of medians. Ours runs in one batch and, for comparison, one target at a
time. Run by `make bench`, which puts breaching on the path; on a GPU, where peak memory and
utilization are printed too::

    PYTHONPATH=.:.venv-bench .venv/bin/python tests/benchmarks/bench_gradient_similarity.py \\
        --device cuda --only lenet-zhu --targets 1024
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata
from types import SimpleNamespace
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.gradient_similarity import GradientSimilarity
from fl_privacy import component
from fl_privacy.metrics.images import psnr_each
from fl_privacy.protocols import Dataset
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Observation, Reconstruction, Samples, Task

TASK = Task(input_shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
TRAINING = LocalTraining(lr=0.1, batch_norm="eval")
TV = 2e-3


@dataclass(frozen=True)
class Setting:
    """One network: targets and iterations of ours, and of the serial attacks.

    Ours runs about as long as an attack does, so that what it does once is counted as such.
    """

    model: str
    targets: int
    few: int
    iterations: int
    serial: int
    quality: int
    data: str = ""

    def build(self) -> nn.Module:
        """The untrained network, batch norm in eval mode."""
        network: nn.Module = component.create("models", self.model).build(TASK, seed=0)
        return network.eval()


SETTINGS = (Setting("lenet-zhu", 32, 4, 600, 150, 600), Setting("convnet64", 4, 1, 120, 8, 0))
DEFAULTS = ", ".join(f"{s.targets} on {s.model}" for s in SETTINGS)
ALONE = "one at a time"
Run = Callable[[], Tensor | None]


def pictures(count: int, device: torch.device, data: str) -> Samples:
    """Test images of an .npz file, or random low-frequency pictures, which need no download."""
    if data:
        source: Dataset = component.create("datasets", f"npz(path={data!r})")
        chosen = torch.randperm(len(source.labels("test")), generator=generator(0, "quality"))
        held = source.load("test", chosen[:count])
        return Samples(held.inputs.to(device), held.labels.to(device))
    coarse = torch.rand(count, 3, 5, 5, generator=generator(0, "bench"))
    inputs = F.interpolate(coarse, size=32, mode="bicubic", align_corners=True).clamp(0, 1)
    return Samples(inputs.to(device), torch.arange(count, device=device) % 10)


def gradients_of(model: nn.Module, samples: Samples, i: int) -> list[Tensor]:
    """Loss gradient of one picture."""
    outputs = model(TASK.normalize(samples.inputs[i : i + 1]))
    loss = F.cross_entropy(outputs, samples.labels[i : i + 1])
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def observe(setting: Setting, samples: Samples) -> list[Observation]:
    """The targets, recorded and observed as in a run."""
    model = setting.build()
    layout = Layout.of(model)
    location = f"memory://bench-{uuid4().hex}"
    with RecordingWriter.open(
        location, Manifest(created="", task=TASK, local_training=TRAINING)
    ) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in model.state_dict().items()}, layout)
        for i in range(len(samples)):
            steps = zip(model.named_parameters(), gradients_of(model, samples, i), strict=True)
            buffers = {n: b.numpy() for n, b in model.named_buffers()}
            writer.append(
                round=1,
                node=str(i),
                arrays={n: (p - TRAINING.lr * g).detach().numpy() for (n, p), g in steps} | buffers,
                num_examples=1,
                global_digest=sent,
                layout=layout,
            )
    return ThreatModel().observe(Recording(location), model=setting.build)


def ours(
    observations: list[Observation],
    iterations: int,
    device: torch.device,
    *,
    width: int = 0,
    compiled: bool = False,
) -> Tensor:
    """Batches of ``width`` targets, by default all in one; pixels ``[targets, 3, 32, 32]``."""
    attack = GradientSimilarity(
        iterations=iterations, tv=TV, compiled=compiled, width=width or len(observations)
    )
    results = attack.attack(observations, seed=0, device=device)
    return torch.cat([r.inputs for r in results if isinstance(r, Reconstruction)])


def objective_of(model: nn.Module, x: Tensor, label: Tensor, observed: list[Tensor]) -> Tensor:
    """What all three minimize: ``1 - cosine + TV``, scalar."""
    loss = F.cross_entropy(model(x), label)
    simulated = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    dot = sum((a * b).sum() for a, b in zip(simulated, observed, strict=True))
    norms = sum(a.square().sum() for a in simulated) * sum(b.square().sum() for b in observed)
    variation = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
    return torch.as_tensor(1 - dot / torch.as_tensor(norms).sqrt() + TV * variation)


def plain_loop(model: nn.Module, samples: Samples, targets: range, iterations: int) -> Tensor:
    """One target after the other, as most code does it; gradient on the input only."""
    device = samples.inputs.device
    low, high = (TASK.normalize(torch.full(TASK.input_shape, v)).to(device) for v in (0.0, 1.0))
    found = []
    for i in targets:
        observed = gradients_of(model, samples, i)
        start = torch.randn(1, *TASK.input_shape, generator=generator(0, i))
        x = start.to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        milestones = [iterations * k // 8 for k in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for _ in range(iterations):
            objective = objective_of(model, x, samples.labels[i : i + 1], observed)
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
    setup = {"device": samples.inputs.device, "dtype": torch.float32}
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
    """Seconds until the device is done, and result, with the peer's chatter swallowed."""
    with redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


def final(model: nn.Module, samples: Samples, found: Tensor) -> str:
    """Mean objective and PSNR of what an attack found."""
    found = found.to(samples.inputs.device)
    losses = [
        objective_of(
            model,
            TASK.normalize(x[None]),
            samples.labels[i : i + 1],
            gradients_of(model, samples, i),
        ).item()
        for i, x in enumerate(found.clamp(0, 1))
    ]
    psnr = psnr_each(found.clamp(0, 1), samples.inputs[: len(found)]).mean()
    return f"objective {statistics.mean(losses):.4f}, PSNR {psnr:.1f} dB, n = {len(found)}"


def measure(setting: Setting, repeats: int, device: torch.device, *, compiled: bool) -> None:
    """Print target-iterations a second and the ratios for one network."""
    on_cpu = pictures(setting.targets, torch.device("cpu"), setting.data)
    observations, samples = (
        observe(setting, on_cpu),
        pictures(setting.targets, device, setting.data),
    )
    model = setting.build().to(device)

    def runs(iterations: int, serial: int, most: int) -> dict[str, tuple[int, int, Run]]:
        few = min(most, setting.targets)
        own = setting.targets, iterations, lambda: ours(observations, iterations, device)
        return {
            "ours": own,
            ALONE: (few, iterations, lambda: ours(observations[:few], iterations, device, width=1)),
            "loop": (few, serial, lambda: plain_loop(model, samples, range(few), serial)),
            "breaching": (few, serial, lambda: breaching_loop(model, samples, range(few), serial)),
        }

    print(f"\nGS, {setting.model}, {setting.targets} targets, 3x32x32")
    rates: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for name, (count, iterations, run) in runs(
            setting.iterations, setting.serial, setting.few
        ).items():
            seconds, result = timed(run)
            if repeat and result is not None:  # the first round warms up
                rates.setdefault(name, []).append(count * iterations / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    if compiled:
        medians["compiled"] = compiled_rate(setting, observations, device)
    for name, rate in medians.items():
        print(f"{name:13s} {rate:9.1f} target-iterations/s  {1e3 / rate:8.3f} ms each")
    for own in ("ours", "compiled"):
        for name in (ALONE, "loop", "breaching"):
            if own in medians and name in medians:
                print(f"{own} / {name}: {medians[own] / medians[name]:.2f}")
    if "breaching" not in medians:
        print("breaching is not installed: run `make bench`")
    if device.type == "cuda":
        print(load(lambda: ours(observations, setting.iterations, device), device))
    if setting.quality:
        print(f"after {setting.quality} iterations")
        for name, (_, _, run) in runs(setting.quality, setting.quality, 8).items():
            _, result = timed(run)
            if result is not None:
                print(f"{name:13s} {final(model, samples, result[:8])}")


def load(run: Callable[[], object], device: torch.device, seconds: float = 5) -> str:
    """Peak memory and utilization of a GPU that does ``run`` again and again."""
    torch.cuda.reset_peak_memory_stats(device)
    watch = watched(device)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run()
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    readings = []
    if watch:
        watch.terminate()
        readings = [int(word) for word in watch.communicate()[0].split() if word.isdecimal()]
    used = f"{statistics.median(readings):.0f} % (median)" if readings else "could not be read"
    return f"peak memory {peak:.2f} GiB, utilization {used}, n = {len(readings)}"


def watched(device: torch.device) -> subprocess.Popen[str] | None:
    """A process that writes the utilization of a GPU in percent, five times a second."""
    if shutil.which("nvidia-smi") is None:
        return None
    chosen = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    return subprocess.Popen(["nvidia-smi", chosen, *query], stdout=subprocess.PIPE, text=True)


def compiled_rate(setting: Setting, observations: list[Observation], device: torch.device) -> float:
    """Target-iterations a second of the compiled step, once it is compiled."""

    def run() -> Tensor:
        return ours(observations, setting.iterations, device, compiled=True)

    first, again = timed(run)[0], timed(run)[0]
    print(f"compiling took {first - again:.0f} s")
    return setting.targets * setting.iterations / again


def versions(device: torch.device) -> str:
    """Of all that decides the figures, and what they were measured on."""
    try:
        peer = metadata.version("breaching")
    except metadata.PackageNotFoundError:
        peer = "missing"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return (
        f"fl-privacy {component.VERSION}, breaching {peer}, torch {torch.__version__}, "
        f"{where}, threads {torch.get_num_threads()}"
    )


def main() -> None:
    """Print the versions, then each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", help="absolute path of an .npz with 3x32x32 test images")
    parser.add_argument("--only", default="", help="one network")
    parser.add_argument("--device", default="cpu", type=torch.device, help="such as cuda")
    parser.add_argument("--targets", type=int, help="in one batch; default: " + DEFAULTS)
    parser.add_argument("--iterations", type=int, help="of each timed run")
    parser.add_argument("--quality", type=int, help="iterations before objectives are compared")
    parser.add_argument(
        "--compiled", default="lenet-zhu", help="network to time compiled too; empty: none"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(versions(options.device))
    changes = {n: getattr(options, n) for n in ("targets", "iterations", "quality", "data")}
    changes = {n: value for n, value in changes.items() if value is not None}
    for setting in SETTINGS:
        if options.only in ("", setting.model):
            chosen = replace(setting, **changes)
            compiled = chosen.model == options.compiled
            measure(chosen, options.repeats, options.device, compiled=compiled)


if __name__ == "__main__":
    main()

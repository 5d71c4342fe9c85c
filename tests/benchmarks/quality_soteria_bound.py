"""Does theorem 1 of Soteria bound attackers? Its numbers beside real reconstructions.

Each target is a client with one test image, defended by Soteria. Prints, with 95 % intervals
over the n targets, all as L2 distances between images in pixels:

- Lipschitz constants of the feature extractor (certified) and the Jacobian's norm at the image;
- from the **pruned representation** r': ``||r - r'||`` over each of these. They bind an image
  with representation r', and no attacker who looks for another;
- for each adversary the distance of its reconstructions, the certified bound computed from the
  representation **of that reconstruction** (which must not exceed the distance), and the share
  of reconstructions closer to the truth than the values from r' would allow.

No share is expected to be 0: an attack that leaves out the defended layer, or matches its
non-zero columns only, does not aim at r'. Examples::

    python tests/benchmarks/quality_soteria_bound.py DATA/mnist.npz --targets 32
    python tests/benchmarks/quality_soteria_bound.py DATA/cifar10_20k.npz --model convnet64 \\
        --rate 0.6 --targets 8 "gradient_similarity(iterations=120)" \\
        "gradient_similarity(iterations=120, layers='features')"
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clients.defending import step_of
from clients.defenses.soteria import Soteria
from clients.training import local_train
from fl_privacy import component
from fl_privacy.attack_progress import attack_progress
from fl_privacy.certificates import (
    Features,
    certified_bound,
    features_of,
    first_order_estimate,
    jacobian_norm,
    pruned_representation_value,
)
from fl_privacy.feature_chain import ChainError
from fl_privacy.lipschitz import LipschitzError, lipschitz_merged, lipschitz_product
from fl_privacy.local_lipschitz import certified_distance, neighborhood
from fl_privacy.metrics.statistics import mean_interval, wilson
from fl_privacy.protocols import Adversary, Dataset
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Observation, Reconstruction, Samples, Task

ADVERSARIES = (
    "gradient_similarity",
    "gradient_similarity(nonzero=True)",
    "gradient_similarity(layers='features')",
    "dlg(iterations=30)",
    "dlg(iterations=30, nonzero=True)",
    "dlg(iterations=30, layers='features')",
)
"""Plain, matching the entries that are not pruned, and leaving out the defended layer."""

TRAINING = LocalTraining(algorithm="fedsgd", lr=0.1, batch_size=1, batch_norm="eval")
RADII = (0.003, 0.007, 0.016, 0.037, 0.086, 0.2)


@dataclass(frozen=True)
class Target:
    """An image, its representation, and what Soteria left of that."""

    image: Tensor
    representation: Tensor
    pruned: Tensor

    @property
    def gap(self) -> float:
        return float((self.representation - self.pruned).double().norm())


def target_of(model: nn.Module, task: Task, held: Samples, defense: Soteria) -> Target:
    """What Soteria does to one image: columns of the defended gradient that are zero."""
    step = step_of(model, task, held, expected_batch_size=1)
    gradient, _ = defense.defend_gradient(step, generator=generator(0))
    seen = features_of(model, defense.layer, task)(held.inputs[0]).detach()
    kept = (gradient[f"{defense.layer}.weight"] != 0).any(0)
    return Target(held.inputs[0], seen, seen * kept)


def observed(
    folder: Path,
    model: nn.Module,
    held: Sequence[Samples],
    defense: Soteria,
    names: tuple[str, Task],
) -> list[Observation]:
    """The defended update of each client, as a server sees it."""
    spec, task = names
    sent = {n: t.detach().clone() for n, t in model.state_dict().items()}
    manifest = Manifest(created="", model=spec, task=task, local_training=TRAINING)
    layout = Layout.of(model)
    with RecordingWriter.open(folder, manifest) as writer:
        _, digest = writer.put_global({n: t.numpy() for n, t in sent.items()}, layout)
        for node, samples in enumerate(held):
            model.load_state_dict(sent)
            result = local_train(
                model,
                task,
                samples,
                TRAINING,
                generator=generator(0, "client", node),
                gradient_defense=defense,
                defense_generator=generator(0, "defense", node),
            )
            writer.append(
                round=1,
                node=str(node),
                arrays={n: t.numpy() for n, t in result.state.items()},
                num_examples=1,
                global_digest=digest,
                layout=layout,
            )
    model.load_state_dict(sent)
    model.eval()
    return ThreatModel().observe(Recording(folder))


def told(name: str, values: Sequence[float], unit: str = "pixels, L2") -> None:
    """One line: a mean with its interval."""
    mean = mean_interval(values)
    interval = f"[{mean.low:.3g}, {mean.high:.3g}]" if mean.n > 1 else ""
    print(f"{name}: {mean.mean:.4g} {interval} {unit} (n = {mean.n})")


def values_from_pruned(
    model: nn.Module, task: Task, layer: str, targets: Sequence[Target]
) -> tuple[float, list[float], list[float]]:
    """Print constants and values from r'; give the tighter constant and the values by target."""
    product, tighter = (
        bound(model, layer, task) for bound in (lipschitz_product, lipschitz_merged)
    )
    print(f"certified Lipschitz constant: product {product:.4g}, merged {tighter:.4g} (per pixel)")
    features = features_of(model, layer, task)
    norms = [jacobian_norm(features, t.image) for t in targets]
    told("norm of the Jacobian at the image", norms, "per pixel")
    told("||r - r'||", [t.gap for t in targets], "features, L2")
    certified = [pruned_representation_value(t.representation, t.pruned, tighter) for t in targets]
    first = [
        first_order_estimate(t.representation, t.pruned, norm)
        for t, norm in zip(targets, norms, strict=True)
    ]
    told("value from the pruned r', certified constant", certified)
    try:
        near = [neighborhood(model, layer, task, t.image, radii=RADII) for t in targets[:8]]
        local = [certified_distance(n, t.gap) for n, t in zip(near, targets, strict=False)]
        told("value from the pruned r', constants near the image", local)
    except (ChainError, LipschitzError) as error:
        print(f"no constants near the image: {error}")
    told("value from the pruned r', first-order estimate", first)
    return tighter, certified, first


def line(
    name: str,
    found: Sequence[Reconstruction],
    targets: Sequence[Target],
    features: Features,
    known: tuple[float, list[float], list[float]],
) -> str:
    """One row of a Markdown table."""
    tighter, certified, first = known
    apart = [
        float((r.inputs[0] - t.image).double().norm()) for r, t in zip(found, targets, strict=True)
    ]
    own = [
        certified_bound(t.representation, features(r.inputs[0]).detach(), tighter)
        for r, t in zip(found, targets, strict=True)
    ]
    broken = sum(bound > distance for bound, distance in zip(own, apart, strict=True))
    shares = []
    for values in (certified, first):
        below = sum(d < v for d, v in zip(apart, values, strict=True))
        share = wilson(below, len(apart))
        shares.append(f"{100 * share.mean:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]")
    distance, bound = mean_interval(apart), mean_interval(own)
    cells = (
        f"`{name}`",
        f"{distance.mean:.3g} [{distance.low:.3g}, {distance.high:.3g}]",
        f"{bound.mean:.3g} [{bound.low:.3g}, {bound.high:.3g}]",
        f"{broken}",
        *shares,
    )
    return f"| {' | '.join(cells)} |"


def attacked(
    name: str, observations: Sequence[Observation], device: torch.device
) -> list[Reconstruction]:
    """Reconstructions by an adversary that is told nothing but local training."""
    adversary: Adversary = component.create("adversaries", name)
    with attack_progress(name) as progress:
        results: list[Any] = list(
            adversary.attack(observations, seed=0, device=device, progress=progress)
        )
    failed = [result.reason for result in results if not isinstance(result, Reconstruction)]
    if failed:
        raise SystemExit(f"{name}: {failed[0]}")
    return results


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="an .npz file, or the name of a dataset")
    parser.add_argument("adversaries", nargs="*", default=list(ADVERSARIES))
    parser.add_argument("--model", default="lenet-zhu")
    parser.add_argument("--layer", default="classifier")
    parser.add_argument("--rate", type=float, default=0.4, help="of the active features")
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Defend, attack, print."""
    options = parsed()
    path = Path(options.data).absolute()
    dataset = f"npz(path={str(path)!r})" if path.exists() else options.data
    source: Dataset = component.create("datasets", dataset)
    task = source.task()
    model: nn.Module = component.create("models", options.model).build(task, seed=options.seed)
    model.eval()
    draw = generator(options.seed, "quality")
    order = torch.randperm(len(source.labels("test")), generator=draw)[: options.targets]
    held = [source.load("test", order[i : i + 1]) for i in range(len(order))]
    defense = Soteria(layer=options.layer, rate=options.rate)
    targets = [target_of(model, task, samples, defense) for samples in held]
    with tempfile.TemporaryDirectory() as folder:
        seen = observed(Path(folder), model, held, defense, (options.model, task))
        known = values_from_pruned(model, task, options.layer, targets)
        features = features_of(model, options.layer, task)
        print(
            "\n| adversary | distance [95 %] | certified bound from its own representation [95 %] "
            "| closer | below the value from r', %: certified | first-order |\n"
            "|---|---|---|---|---|---|"
        )
        for name in ["baseline", *options.adversaries]:
            found = attacked(name, seen, torch.device(options.device))
            print(line(name, found, targets, features, known), flush=True)


if __name__ == "__main__":
    main()

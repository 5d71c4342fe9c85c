"""How well attacks invert the updates of real clients, on any ``.npz`` images.

Prints, for each adversary, mean PSNR with its 95 % interval and quartiles over the ``n``
targets that could be attacked; over all targets, failed ones counting as 0, the shares above
25 dB and identified among 1,000 other images, and the labels found. The first rows guess:
the mean image, the best constant, and the training image of the label whose gradient fits
best, from all of 2,000 training images. Targets are test images drawn by the seed; nothing
is chosen by the truth. Examples::

    python tests/benchmarks/quality_inversion.py DATA/cifar10_20k.npz \\
        gradient_similarity "dlg(iterations=300)" rgap --targets 100
    python tests/benchmarks/quality_inversion.py DATA/cifar10_20k.npz \\
        "gradient_similarity(iterations=4800)" --targets 25 --images 4 \\
        --algorithm fedavg --epochs 5 --batch-size 2 --lr 0.01
    python tests/benchmarks/quality_inversion.py DATA/cifar10_20k.npz \\
        "gradient_similarity(iterations=4800, restarts=4)" --targets 25 --images 4 \\
        --algorithm fedavg --epochs 5 --batch-size 2 --lr 0.01 --order shuffled
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adversaries.local_steps import Client, Sent, skeleton
from adversaries.targets import gradient_units, prepare
from clients.training import evaluate_model, local_train
from fl_privacy import component
from fl_privacy.analysis import analyze
from fl_privacy.attack_command import failures
from fl_privacy.attack_progress import attack_progress
from fl_privacy.metrics.statistics import mean_interval, quartiles, share_interval, wilson
from fl_privacy.plan import METRICS, Plan
from fl_privacy.protocols import Dataset
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange, LocalTraining, Observation, Samples

AUXILIARY = 2000
GUESSES = ("baseline", "baseline(guess='constant')", f"nearest_image(candidates={AUXILIARY})")
COLUMNS = (
    "adversary",
    "PSNR dB [95 %]",
    "quartiles",
    "> 25 dB, %",
    "identified, %",
    "labels, %",
    "n",
    "failed",
    "s",
)


def trained(model: nn.Module, source: Dataset, epochs: int, seed: int) -> nn.Module:
    """``model`` after central training on the training split; prints its test accuracy."""
    if epochs:
        training = LocalTraining(algorithm="fedavg", lr=0.1, epochs=epochs, batch_size=32)
        draw = generator(seed, "central training")
        local_train(model, source.task(), source.load("train"), training, generator=draw)
        _, accuracy = evaluate_model(model, source.task(), source.load("test"))
        print(f"trained for {epochs} epochs: test accuracy {accuracy:.1%}\n")
    return model


def record(run: Path, dataset: str, model: nn.Module, options: argparse.Namespace) -> None:
    """An audited run of one round: ``targets`` clients, each with test images of its own."""
    source = component.create("datasets", dataset)
    task, training = source.task(), training_of(options)
    layout = Layout.of(model)
    sent = {n: t.detach().clone() for n, t in model.state_dict().items()}
    count, needed = len(source.labels("test")), options.targets * options.images
    order = torch.randperm(count, generator=generator(options.seed, "quality"))[:needed]
    manifest = Manifest(
        created="", model=options.model, dataset=dataset, task=task, local_training=training
    )
    vault = TruthVault(run / "truth")
    with RecordingWriter.open(run / "recording", manifest) as writer:
        _, digest = writer.put_global({n: t.numpy() for n, t in sent.items()}, layout)
        for node, chosen in enumerate(order.split(options.images)):  # type: ignore[no-untyped-call]
            held: Samples = source.load("test", chosen)
            model.load_state_dict(sent)
            draw = generator(options.seed, "client", node)
            result = local_train(model, task, held, training, generator=draw)
            writer.append(
                round=1,
                node=str(node),
                arrays={n: t.numpy() for n, t in result.state.items()},
                num_examples=result.num_examples,
                global_digest=digest,
                layout=layout,
            )
            vault.write(attempt=1, round=1, node=str(node), step=0, samples=held, indices=chosen)
    model.load_state_dict(sent)


def report_mismatch(run: Path, threat_model: ThreatModel) -> None:
    """How far updates simulated from the true images are from the clients', by their labels."""
    recording, vault = Recording(run / "recording"), TruthVault(run / "truth")

    def told(exchange: Exchange) -> Tensor:
        return vault.samples([exchange]).labels

    training = recording.manifest.local_training
    assert training is not None, "`record` names it"
    true, used = [], []
    for observation in threat_model.observe(recording, oracle=told):
        held = vault.samples(observation.exchanges)
        attacked = prepare(observation, skeleton(observation.model(), training))
        true.append(mismatch(observation, held.inputs, held.labels))
        used.append(mismatch(observation, held.inputs, attacked.labels))
    print(
        f"simulated from the true images in the order held ({training.order} training), updates "
        f"differ from the clients' by {median(true):.2g} of their length with the true labels, "
        f"each at its image, and by {median(used):.2g} with the {threat_model.labels} labels as "
        f"an attack gets them{'' if threat_model.oracles else ', in ascending order'} "
        f"(medians, n = {len(true)})\n"
    )


def mismatch(observation: Observation, inputs: Tensor, labels: Tensor) -> float:
    """Relative distance of the real update from the one unrolled from ``inputs``, ``labels``."""
    (exchange,), training = observation.exchanges, observation.local_training
    assert training is not None, "checked by the caller"
    model = skeleton(observation.model(), training)
    kept = dict(model.named_buffers())
    buffers = {n: b for n, b in exchange.buffers.items() if n in kept}
    known = Sent(dict(exchange.parameters), buffers)
    client = Client(model, training, (len(labels),), (known,))
    (unrolled,) = client.simulate(observation.task.normalize(inputs), labels)
    seen = gradient_units(exchange, training, merged=0)
    real = torch.cat([g.flatten() for g in seen.values()])
    found = torch.cat([unrolled[n].detach().flatten() for n in seen])
    return float((found - real).norm() / real.norm())


def training_of(options: argparse.Namespace) -> LocalTraining:
    """What every client does."""
    return LocalTraining(
        algorithm=options.algorithm,
        lr=options.lr,
        epochs=options.epochs,
        batch_size=options.batch_size or options.images,
        order=options.order,
        batch_norm=options.batch_norm,
    )


def dataset_of(data: str) -> str:
    """The spec of a data set that is named, or of an ``.npz`` file that is there."""
    path = Path(data).absolute()
    return f"npz(path={str(path)!r})" if path.exists() else data


def auxiliary(dataset: str, folder: Path) -> str:
    """Training images as the test split of a data set, which is what a threat model grants."""
    source: Dataset = component.create("datasets", dataset)
    held = source.load("train", torch.arange(min(AUXILIARY, len(source.labels("train")))))
    path, x, y = folder / "auxiliary.npz", held.inputs.numpy(), held.labels.numpy()
    x = x[:, 0] if x.ndim == 3 else x  # signals are stored without a channel
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return f"npz(path={str(path)!r})"


def line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One row of a Markdown table; a target that could not be attacked has no share of 1."""
    attacked = [row for row in rows if row["status"] != "failed"]
    failed = [0.0] * (len(rows) - len(attacked))
    psnr = [row["psnr"] for row in attacked]
    mean, spread = mean_interval(psnr), quartiles(psnr)
    shares = (
        wilson(sum(value > 25 for value in psnr), len(rows)),
        share_interval([*(row["identifiability"] for row in attacked), *failed]),
        share_interval([*(row["label_accuracy"] for row in attacked), *failed]),
    )
    cells = (
        f"`{name}`",
        f"{mean.mean:.1f} [{mean.low:.1f}, {mean.high:.1f}]",
        f"{spread.lower:.1f} / {spread.median:.1f} / {spread.upper:.1f}",
        *(f"{100 * s.mean:.0f} [{100 * s.low:.0f}, {100 * s.high:.0f}]" for s in shares),
        f"{mean.n}",
        f"{len(failed)}",
        f"{sum(row['seconds'] or 0.0 for row in attacked):.0f}",
    )
    return f"| {' | '.join(cells)} |"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="an .npz file, or the name of a dataset")
    parser.add_argument("adversaries", nargs="*")
    parser.add_argument("--model", default="lenet-zhu")
    parser.add_argument("--train", type=int, default=0, help="epochs of training before the round")
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--images", type=int, default=1, help="images of each client")
    parser.add_argument("--algorithm", default="fedsgd", choices=("fedsgd", "fedavg"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=0, help="default: all images")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--order", default="sequential", choices=("sequential", "shuffled"))
    parser.add_argument("--batch-norm", default="train", choices=("train", "eval"))
    parser.add_argument("--oracle", action="store_true", help="grant the labels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Record, attack, print."""
    options = parsed()
    dataset = dataset_of(options.data)
    source: Dataset = component.create("datasets", dataset)
    network = component.create("models", options.model).build(source.task(), seed=options.seed)
    network = trained(network, source, options.train, options.seed)
    labels = "oracle" if options.oracle else "inferred"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        record(run, dataset, network, options)
        if options.algorithm == "fedavg":
            report_mismatch(run, ThreatModel(labels=labels))
        held = auxiliary(dataset, run)
        print("|", " | ".join(COLUMNS), "|\n" + "|---" * len(COLUMNS) + "|")
        reasons = []
        for name in [*GUESSES, *options.adversaries]:
            granted = ThreatModel(auxiliary=held if name in GUESSES else "", labels=labels)
            plan = Plan(
                adversary=name,
                threat_model=granted,
                seed=options.seed,
                metrics=(*METRICS, "identifiability"),
            )
            with attack_progress(name) as progress:
                result = analyze(run, plan, progress=progress)
            print(line(name, result.rows()), flush=True)
            reasons += [f"{name}: {n} failed: {why}" for why, n in failures(result).items()]
    print("", *reasons, sep="\n")


if __name__ == "__main__":
    main()

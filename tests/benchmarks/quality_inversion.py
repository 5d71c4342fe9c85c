"""How well attacks invert one-step gradients of an untrained network, on any ``.npz`` images.

Prints, for each adversary, mean PSNR with its 95 % interval, quartiles, the share above
25 dB, the labels found, and the baseline on the same targets. Nothing is chosen by the
truth. Example::

    python tests/benchmarks/quality_inversion.py DATA/cifar10_20k.npz --targets 100 \\
        gradient_similarity "dlg(iterations=300)" rgap
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from fl_privacy import component
from fl_privacy.analysis import Plan, analyze
from fl_privacy.attack_progress import attack_progress
from fl_privacy.metrics.statistics import mean_interval, quartiles, wilson
from fl_privacy.recording import Layout, Manifest, RecordingWriter
from fl_privacy.results import ResultSet
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import LocalTraining, Samples


def record(run: Path, dataset: str, model: str, images: int, targets: int, seed: int) -> None:
    """An audited run of ``targets`` clients, each one SGD step on ``images`` test images."""
    source = component.create("datasets", dataset)
    task, training = source.task(), LocalTraining(lr=0.1, batch_size=images)
    network = component.create("models", model).build(task, seed=seed).train()
    layout = Layout.of(network)
    state = {n: t.detach().clone() for n, t in network.state_dict().items()}
    count = len(source.labels("test"))
    order = torch.randperm(count, generator=generator(seed, "quality"))[: targets * images]
    manifest = Manifest(
        created="", model=model, dataset=dataset, task=task, local_training=training
    )
    vault = TruthVault(run / "truth")
    with RecordingWriter.open(run / "recording", manifest) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in state.items()}, layout)
        for node, chosen in enumerate(order.split(images)):  # type: ignore[no-untyped-call]
            held: Samples = source.load("test", chosen)
            network.load_state_dict(state)
            optimizer = torch.optim.SGD(network.parameters(), lr=training.lr)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(task.normalize(held.inputs)), held.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            writer.append(
                round=1,
                node=str(node),
                arrays={n: t.detach().numpy() for n, t in network.state_dict().items()},
                num_examples=images,
                global_digest=sent,
                layout=layout,
            )
            vault.write(attempt=1, round=1, node=str(node), step=0, samples=held, indices=chosen)


def line(name: str, result: ResultSet) -> str:
    """One row of a Markdown table."""
    rows = result.rows()
    psnr = [row["psnr"] for row in rows if row["psnr"] is not None]
    if not psnr:
        return f"| {name} | no target attacked: {rows[0]['message']} |"
    mean, spread = mean_interval(psnr), quartiles(psnr)
    sharp = wilson(sum(value > 25 for value in psnr), len(psnr))
    labels = mean_interval([row["label_accuracy"] for row in rows if row["psnr"] is not None])
    seconds = sum(row["seconds"] or 0.0 for row in rows)
    return (
        f"| `{name}` | {mean.mean:.1f} [{mean.low:.1f}, {mean.high:.1f}] "
        f"| {spread.lower:.1f} / {spread.median:.1f} / {spread.upper:.1f} "
        f"| {100 * sharp.mean:.0f} [{100 * sharp.low:.0f}, {100 * sharp.high:.0f}] "
        f"| {100 * labels.mean:.0f} | {mean.n} | {seconds:.0f} |"
    )


def main() -> None:
    """Record, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="an .npz file, or the name of a dataset")
    parser.add_argument("adversaries", nargs="+")
    parser.add_argument("--model", default="lenet-zhu")
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--images", type=int, default=1, help="images in each batch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = Path(options.data).absolute()
    dataset = f"npz(path={str(path)!r})" if path.exists() else options.data
    print("| adversary | PSNR dB [95 %] | quartiles | > 25 dB, % | labels, % | n | seconds |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        record(run, dataset, options.model, options.images, options.targets, options.seed)
        for name in ["baseline", *options.adversaries]:
            guess = ThreatModel(auxiliary=dataset if name == "baseline" else "")
            plan = Plan(adversary=name, threat_model=guess, seed=options.seed, device="auto")
            with attack_progress(name) as progress:
                print(line(name, analyze(run, plan, progress=progress)), flush=True)


if __name__ == "__main__":
    main()

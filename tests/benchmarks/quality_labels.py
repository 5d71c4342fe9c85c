"""How often the labels of a batch are counted right, on untrained networks.

Each batch comes from a client that holds some classes only. Prints for each batch size the
share of batches with all counts right (95 % Wilson interval) and of labels right, in
percent, from the last layer's bias and from its weight rows alone, without and with
auxiliary data (the test split)::

    python tests/benchmarks/quality_labels.py --model lenet-zhu --classes 2 --batches 32
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.local_steps import skeleton
from adversaries.targets import prepare
from fl_privacy import component
from fl_privacy.metrics.statistics import wilson
from fl_privacy.protocols import Dataset
from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, LocalTraining, Observation, Task

SIZES = (1, 2, 4, 8, 16, 32)


def drawn(labels: Tensor, images: int, classes: int, seed: int) -> Tensor:
    """Positions of the images of one client that holds ``classes`` classes."""
    draw = generator(seed, "labels", images)
    own = torch.randperm(int(labels.max()) + 1, generator=draw)[:classes]
    pool = torch.isin(labels, own).nonzero().flatten()
    return pool[torch.randperm(len(pool), generator=draw)[:images]]


def trained(model: nn.Module, x: Tensor, y: Tensor, training: LocalTraining, seed: int) -> Exchange:
    """One client's round by `torch.optim.SGD`, shuffled anew in each epoch."""
    sent = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=training.lr)
    draw, whole = generator(seed, "order"), training.algorithm == "fedsgd"
    for _ in range(training.epochs):
        order = torch.randperm(len(y), generator=draw)
        for part in torch.split(order, len(y) if whole else training.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    update = {n: p.detach() - sent[n] for n, p in model.named_parameters()}
    return Exchange(
        attempt=1,
        round=1,
        node="1",
        num_examples=len(y),
        digest="",
        global_digest="",
        parameters=sent,
        buffers={},
        update=update,
        returned_buffers={},
    )


def observations(
    dataset: Dataset, spec: str, images: int, classes: int, training: LocalTraining, batches: int
) -> Iterator[tuple[Observation, Tensor]]:
    """Clients of networks drawn anew, and their true labels."""
    task: Task = dataset.task()
    labels = dataset.labels("train")
    for seed in range(batches):
        held = dataset.load("train", drawn(labels, images, classes, seed))
        model = component.create("models", spec).build(task, seed=seed)
        exchange = trained(model, task.normalize(held.inputs), held.labels, training, seed)
        target = Observation("", (exchange,), partial(same, model), task, local_training=training)
        yield target, held.labels


def same(model: nn.Module) -> nn.Module:
    """The model itself, for a factory."""
    return model


def right(observation: Observation, truth: Tensor) -> float:
    """Share of labels found, whatever their order."""
    training = observation.local_training
    assert training is not None
    found = prepare(observation, skeleton(observation.model(), training)).labels
    classes = observation.task.classes
    mine, true = (torch.bincount(labels, minlength=classes) for labels in (found, truth))
    return float(torch.minimum(mine, true).sum()) / len(truth)


def main() -> None:
    """Train, count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="fashion-mini")
    parser.add_argument("--model", default="lenet-zhu")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=0, help="local epochs; 0: one step")
    parser.add_argument("--batch-size", type=int, default=8, help="of local epochs")
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args()
    dataset = component.create("datasets", options.data)
    auxiliary = dataset.load("test")
    training = LocalTraining(lr=options.lr)
    if options.epochs:
        training = LocalTraining(
            algorithm="fedavg",
            lr=options.lr,
            epochs=options.epochs,
            batch_size=options.batch_size,
        )
    made = {
        images: list(
            observations(dataset, options.model, images, options.classes, training, options.batches)
        )
        for images in SIZES
    }
    print("| read off | " + " | ".join(map(str, SIZES)) + " |")
    print("|---" * (len(SIZES) + 1) + "|")
    for name, withheld in {"bias": (), "rows alone": ("classifier.bias",)}.items():
        for held in (None, auxiliary):
            cells = [
                cell([right(replace(one, withheld=withheld, auxiliary=held), t) for one, t in some])
                for some in made.values()
            ]
            source = name + ("" if held is None else ", auxiliary")
            print(f"| {source} | " + " | ".join(cells) + " |", flush=True)


def cell(shares: list[float]) -> str:
    """Share of batches that are all right with its interval, and of labels; in percent."""
    exact = wilson(sum(share == 1 for share in shares), len(shares))
    low, mean, high = (100 * value for value in (exact.low, exact.mean, exact.high))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}] / {100 * sum(shares) / len(shares):.1f}"


if __name__ == "__main__":
    main()

"""What each layer's gradient tells of a property of real faces, before and after training.

Prints for an untrained network and one trained for ``--steps`` batches of 32 on the clients'
people, measured on the auxiliary people: V-information of each layer in nats, what is left of it
when the property is shuffled, the ceiling, and the in-sample value of eq. (1); then the distance
between subspaces of gradients, beside its nulls. Four minutes on one core::

    python tests/benchmarks/quality_v_information.py CELEBA.npz --task Male --property Smiling
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.layerwise.subspace import SubspaceDistance
from adversaries.layerwise.v_information import VInformation
from fl_privacy import component
from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, LayerScores, LocalTraining, Observation, Samples, Task

CPU = torch.device("cpu")
TRAINING = LocalTraining(lr=0.01, batch_size=32)


def trained(model: nn.Module, task: Task, samples: Samples, steps: int) -> float:
    """Plain SGD in place, momentum 0.9 to get there in fewer steps; the last tenth's loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=TRAINING.lr, momentum=0.9)
    draw, losses = generator(0, "training"), [math.nan]
    for _ in range(steps):
        chosen = torch.randint(len(samples), (TRAINING.batch_size,), generator=draw)
        loss = F.cross_entropy(
            model(task.normalize(samples.inputs[chosen])), samples.labels[chosen]
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def sent(model: nn.Module, task: Task) -> Observation:
    """An observation whose global model is ``model`` as it is."""
    state: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}
    exchange = Exchange(1, 1, "1", TRAINING.batch_size, "", "", state, {}, {}, {})
    return Observation("", (exchange,), lambda: model, task, local_training=TRAINING)


def shown(found: LayerScores) -> None:
    """A row a layer."""
    print(f"n {found.n};", "  ".join((found.metric, *found.columns)))
    for i, layer in enumerate(found.layers):
        cells = [float(found.values[i]), *(float(c[i]) for c in found.columns.values())]
        print(f"{layer:8}", "  ".join(f"{cell:8.3f}" for cell in cells))


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("path", type=Path, help=".npz file as the dataset takes it")
    parser.add_argument("--dataset", default="celeba", help="celeba or lfw")
    parser.add_argument("--task", default="Male")
    parser.add_argument("--property", default="Smiling")
    parser.add_argument("--model", default="alexnet-mo")
    parser.add_argument("--steps", type=int, default=300, help="of training, before the second")
    parser.add_argument("--family", default="forest", help="forest, logistic or mlp")
    parser.add_argument("--batches", type=int, default=16, help="of each kind in each fold")
    parser.add_argument("--permutations", type=int, default=5)
    given = parser.parse_args()
    settings = {
        "path": str(given.path.absolute()),
        "main_task": given.task,
        "properties": (given.property,),
        "held_out": "auxiliary",
    }
    source = component.create("datasets", given.dataset, settings)
    metrics = (
        VInformation(family=given.family, batches=given.batches, permutations=given.permutations),
        SubspaceDistance(),
    )
    task, auxiliary, own = source.task(), source.load("test"), source.load("train")
    has = auxiliary.properties[given.property]
    print(f"{len(auxiliary)} auxiliary samples, {int((has == 1).sum())} with {given.property}")
    model = component.create("models", given.model).build(task, seed=0)
    for steps in (0, given.steps):
        start = time.process_time()
        loss = trained(model, task, own, steps)
        print(f"\n{given.model} after {steps} steps, loss {loss:.3f}")
        for metric in metrics:
            shown(metric.measure([sent(model, task)], auxiliary, seed=0, device=CPU))
        print(f"{time.process_time() - start:.0f} s of CPU")


if __name__ == "__main__":
    main()

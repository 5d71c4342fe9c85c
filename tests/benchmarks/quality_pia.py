"""How well passive property inference does on real faces: AUC of each layer, with its null.

Two clients train by FedSGD (batch 32, learning rate 0.01): the victim, whose batches have the
property in every fifth round and not otherwise, and the adversary, whose batches never do.
Clients' and auxiliary people are disjoint. Printed are the AUC of the whole update and of each
layer alone over all rounds, with 95 % intervals over the rounds of this victim, and the same when
the property is dealt out anew among auxiliary people (``permuted``). ``--shuffled`` shuffles it
among all samples instead, before the run: a property that nobody can see, leaked and attacked as
any other. On one core
90 seconds a repeat with ``--classifier logistic``, six minutes with the forest::

    python tests/benchmarks/quality_pia.py CELEBA.npz --task Male --property Smiling
    python tests/benchmarks/quality_pia.py LFW.npz --dataset lfw --task Male --property Smiling
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adversaries.property_inference import PropertyInference
from clients.training import evaluate_model, local_train
from fl_privacy import component
from fl_privacy.metrics.auc import auc_interval
from fl_privacy.metrics.statistics import Interval
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Observation, PropertyScores, Samples, Task

CPU = torch.device("cpu")
TRAINING = LocalTraining(lr=0.01, batch_size=32)
EVERY = 5


def recorded(
    model: nn.Module, task: Task, people: Samples, name: str, rounds: int, seed: int
) -> list[Observation]:
    """The victim's updates, a target each; ``model`` is left as trained."""
    has, draw = people.properties[name], generator(seed, "victim and adversary")
    halves = torch.arange(len(people)) % 2
    location, layout = f"memory://quality-pia-{uuid.uuid4().hex}", Layout.of(model)
    with RecordingWriter.open(
        location, Manifest(created="", task=task, local_training=TRAINING)
    ) as writer:
        for number in range(1, rounds + 1):
            sent = {n: t.detach().clone() for n, t in model.state_dict().items()}
            _, digest = writer.put_global({n: t.numpy() for n, t in sent.items()}, layout)
            returned = []
            for half, node in enumerate(("victim", "adversary")):
                wanted = int(half == 0 and number % EVERY == 0)
                held = torch.nonzero((halves == half) & (has == wanted)).flatten()
                model.load_state_dict(sent)
                after = local_train(model, task, people.take(held), TRAINING, generator=draw)
                returned.append(after.state)
                writer.append(
                    round=number,
                    node=node,
                    arrays={n: t.numpy() for n, t in after.state.items()},
                    num_examples=TRAINING.batch_size,
                    global_digest=digest,
                    layout=layout,
                )
            writer.end_round(number)
            model.load_state_dict({n: (returned[0][n] + returned[1][n]) / 2 for n in sent})
    return ThreatModel(own_node="adversary").observe(
        Recording(location), model=lambda: model, task=task
    )


def areas(adversary: PropertyInference, targets: Sequence[Observation]) -> dict[str, Interval]:
    """AUC of the whole update and of each layer."""
    results = list(adversary.attack(targets, seed=0, device=CPU))
    scored = [r for r in results if isinstance(r, PropertyScores)]
    assert len(scored) == len(results), results
    has = [target.exchanges[0].round % EVERY == 0 for target in targets]
    found = {"whole update": [float(r.scores) for r in scored]}
    for layer in scored[0].by_layer:
        found[layer] = [float(r.by_layer[layer]) for r in scored]
    return {name: auc_interval(values, has) for name, values in found.items()}


def shuffled(samples: Samples, name: str, seed: int) -> Samples:
    """The samples with a property dealt out anew, as often as before."""
    values: Tensor = samples.properties[name]
    order = torch.randperm(len(values), generator=generator(seed, "shuffled"))
    return replace(samples, properties={name: values[order]})


def shown(interval: Interval) -> str:
    """The AUC with its bounds."""
    return f"{interval.mean:.3f} [{interval.low:.2f}, {interval.high:.2f}]"


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
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", default="0", help="a repeat each, by comma")
    parser.add_argument("--classifier", default="forest", help="forest, logistic or mlp")
    parser.add_argument("--layers", default="each", help="all, each, or names by comma")
    parser.add_argument("--shuffled", action="store_true")
    given = parser.parse_args()
    for seed in map(int, given.seeds.split(",")):
        repeat(given, seed)


def repeat(given: argparse.Namespace, seed: int) -> None:
    """One run, attacked with and without knowledge."""
    settings = {
        "path": str(given.path.absolute()),
        "main_task": given.task,
        "properties": (given.property,),
        "seed": seed,
    }
    start, groups = time.process_time(), {}
    for held_out in ("auxiliary", "test"):
        source = component.create("datasets", given.dataset, {**settings, "held_out": held_out})
        groups[held_out] = source.load("test")
    people, task = source.load("train"), source.task()
    if given.shuffled:
        people, groups["auxiliary"] = (
            shuffled(samples, given.property, seed + i)
            for i, samples in enumerate((people, groups["auxiliary"]))
        )
    model = component.create("models", given.model).build(task, seed=seed)
    targets = recorded(model, task, people, given.property, given.rounds, seed)
    _, accuracy = evaluate_model(model, task, groups["test"])
    targets = [replace(target, auxiliary=groups["auxiliary"]) for target in targets]
    attack = PropertyInference(
        property=given.property, classifier=given.classifier, layers=given.layers
    )
    found, null = areas(attack, targets), areas(attack.null(), targets)
    positives = sum(target.exchanges[0].round % EVERY == 0 for target in targets)
    print(
        f"{given.dataset} {given.task}, property {given.property}"
        f"{' (shuffled)' if given.shuffled else ''}, {given.model}, {given.classifier}, "
        f"seed {seed}: {positives} batches with it, {len(targets) - positives} without; "
        f"test accuracy {accuracy:.3f}; {time.process_time() - start:.0f} s of CPU"
    )
    for name, area in found.items():
        print(f"  {name:14} AUC {shown(area)}   permuted {shown(null[name])}", flush=True)


if __name__ == "__main__":
    main()

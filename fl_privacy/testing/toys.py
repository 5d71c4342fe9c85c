"""A small federation in memory, observed as a real one is."""

from __future__ import annotations

import uuid

import torch
from torch import nn
from torch.nn import functional as F

from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.seeding import generator
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Observation, Samples, Step, Task

TASK = Task(input_shape=(1, 6, 6), classes=4, mean=(0.4,), std=(0.3,))
TRAINING = LocalTraining(lr=0.1)


def toy_model() -> nn.Module:
    """A small network for `TASK`: two dense layers, the first on the flattened input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Sigmoid(), nn.Linear(16, 4))


def toy_samples(count: int, seed: int = 0) -> Samples:
    """Random pictures of `TASK` with labels in turn."""
    inputs = torch.rand(count, *TASK.input_shape, generator=generator(seed, "toy inputs"))
    return Samples(inputs, torch.arange(count) % TASK.classes)


def toy_observations(
    count: int = 3, *, threat_model: ThreatModel | None = None
) -> tuple[list[Observation], list[Samples]]:
    """One-image gradients of `toy_model`, recorded and observed as in a real run, and their truth.

    Labels and auxiliary data are granted to those who require them by `check_adversary`.
    """
    model, samples = toy_model(), toy_samples(count)
    location = f"memory://fl-privacy-testing-{uuid.uuid4().hex}"
    layout = Layout.of(model)
    sent = {name: t.numpy() for name, t in model.state_dict().items()}
    manifest = Manifest(created="1970-01-01T00:00:00+00:00", task=TASK, local_training=TRAINING)
    truths = [Samples(samples.inputs[i : i + 1], samples.labels[i : i + 1]) for i in range(count)]
    with RecordingWriter.open(location, manifest) as writer:
        _, shared = writer.put_global(sent, layout)
        for i, truth in enumerate(truths):
            outputs = model(TASK.normalize(truth.inputs))
            loss = F.cross_entropy(outputs, truth.labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            stepped = {
                name: (parameter - TRAINING.lr * gradient).detach().numpy()
                for (name, parameter), gradient in zip(
                    model.named_parameters(), gradients, strict=True
                )
            }
            writer.append(
                round=1,
                node=str(i),
                arrays=stepped,
                num_examples=1,
                global_digest=shared,
                layout=layout,
            )
        writer.end_round(1)
    observe = (threat_model or ThreatModel()).observe
    return observe(Recording(location), model=toy_model), truths


def toy_step(images: int = 4) -> Step:
    """One training step of `toy_model`, as a gradient defense sees it."""
    model, samples = toy_model(), toy_samples(images)
    return Step(
        model=model,
        parameters={n: p.detach() for n, p in model.named_parameters()},
        buffers=dict(model.named_buffers()),
        inputs=TASK.normalize(samples.inputs),
        labels=samples.labels,
        loss=lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"),
        expected_batch_size=images,
    )

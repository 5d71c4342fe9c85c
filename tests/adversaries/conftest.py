"""Clients of any network, recorded and observed as in a real run."""

import uuid
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.local_steps import steps
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Observation, Task

ONE_STEP = LocalTraining(lr=1.0)
Observe = Callable[..., list[Observation]]


def observed(
    build: Callable[[], nn.Module],
    task: Task,
    inputs: Tensor,
    *,
    images: int = 1,
    training: LocalTraining = ONE_STEP,
) -> list[Observation]:
    """Observations of clients of ``images`` inputs each, trained with `torch.optim.SGD`."""
    model, labels = build(), torch.arange(len(inputs)) % task.classes
    location, layout = f"memory://test-{uuid.uuid4().hex}", Layout.of(model)
    sent = {n: t.detach().clone() for n, t in model.state_dict().items()}
    manifest = Manifest(created="", task=task, local_training=training)
    with RecordingWriter.open(location, manifest) as writer:
        _, shared = writer.put_global({n: t.numpy() for n, t in sent.items()}, layout)
        for i in range(0, len(inputs), images):
            model.load_state_dict(sent)
            x, y = task.normalize(inputs[i : i + images]), labels[i : i + images]
            optimizer = torch.optim.SGD(
                model.parameters(),
                lr=training.lr,
                momentum=training.momentum,
                weight_decay=training.weight_decay,
            )
            for chosen in steps(training, len(y)):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            writer.append(
                round=1,
                node=str(i),
                arrays={n: t.detach().numpy().copy() for n, t in model.state_dict().items()},
                num_examples=len(y),
                global_digest=shared,
                layout=layout,
            )
    return ThreatModel().observe(Recording(location), model=build)


@pytest.fixture
def observe() -> Observe:
    """`observed`, as a fixture: test files cannot import each other."""
    return observed

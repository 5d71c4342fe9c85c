"""A small recorded federation of the toy network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fl_privacy.recording import Layout, Manifest, RecordingWriter
from fl_privacy.testing import toy_model, toy_samples
from fl_privacy.testing.toys import TASK, TRAINING
from fl_privacy.truth import TruthVault
from fl_privacy.types import Samples

Record = Callable[[Path, Sequence[tuple[int, str]]], Path]


@pytest.fixture
def run(tmp_path: Path, record: Record) -> Path:
    """An audited run of six clients, one image each; the last client is defended."""
    return record(tmp_path, [(1 + i // 3, str(i)) for i in range(6)])


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """An audited run of three clients in one round, a batch of two images each."""
    return recorded(tmp_path, [(1, str(i)) for i in range(3)], images=2)


@pytest.fixture
def record() -> Record:
    """What records a run."""
    return recorded


def recorded(path: Path, places: Sequence[tuple[int, str]], images: int = 1) -> Path:
    """An audited run with a batch of ``images`` behind each (round, node); node 5 is defended."""
    model, samples = toy_model(), toy_samples(len(places) * images)
    layout = Layout.of(model)
    training = TRAINING.model_copy(update={"batch_size": images})
    manifest = Manifest(created="", model="mlp(hidden=(16,))", task=TASK, local_training=training)
    vault = TruthVault(path / "truth")
    with RecordingWriter.open(path / "recording", manifest) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in model.state_dict().items()}, layout)
        for i, (number, node) in enumerate(places):
            held = torch.arange(i * images, (i + 1) * images)
            one = Samples(samples.inputs[held], samples.labels[held])
            loss = torch.nn.functional.cross_entropy(model(TASK.normalize(one.inputs)), one.labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            writer.append(
                round=number,
                node=node,
                arrays={
                    n: (p - TRAINING.lr * g).detach().numpy()
                    for (n, p), g in zip(model.named_parameters(), gradients, strict=True)
                },
                num_examples=images,
                global_digest=sent,
                layout=layout,
            )
            where = {"attempt": 1, "round": number, "node": node}
            vault.write(**where, step=0, samples=one, indices=held)  # type: ignore[arg-type]
            spec = "gaussian_noise(scale=0.1)" if node == "5" else ""
            vault.write_defense(**where, spec=spec, stats={})  # type: ignore[arg-type]
    return path

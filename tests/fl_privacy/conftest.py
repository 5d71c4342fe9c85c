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
def record() -> Record:
    """What records a run."""
    return recorded


def recorded(path: Path, places: Sequence[tuple[int, str]]) -> Path:
    """An audited run with one image behind each (round, node); node 5 is defended."""
    model, samples = toy_model(), toy_samples(len(places))
    layout = Layout.of(model)
    manifest = Manifest(created="", model="mlp(hidden=(16,))", task=TASK, local_training=TRAINING)
    vault = TruthVault(path / "truth")
    with RecordingWriter.open(path / "recording", manifest) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in model.state_dict().items()}, layout)
        for i, (number, node) in enumerate(places):
            one = Samples(samples.inputs[i : i + 1], samples.labels[i : i + 1])
            loss = torch.nn.functional.cross_entropy(model(TASK.normalize(one.inputs)), one.labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            writer.append(
                round=number,
                node=node,
                arrays={
                    n: (p - TRAINING.lr * g).detach().numpy()
                    for (n, p), g in zip(model.named_parameters(), gradients, strict=True)
                },
                num_examples=1,
                global_digest=sent,
                layout=layout,
            )
            where = {"attempt": 1, "round": number, "node": node}
            vault.write(**where, step=0, samples=one, indices=torch.tensor([i]))  # type: ignore[arg-type]
            spec = "gaussian_noise(scale=0.1)" if node == "5" else ""
            vault.write_defense(**where, spec=spec, stats={})  # type: ignore[arg-type]
    return path

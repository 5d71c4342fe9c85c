"""A small synthetic run: digits, two clients' worth of updates, three result sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import JsonValue
from torch import Tensor

from fl_privacy.datasets.digits import Digits
from fl_privacy.exchanges import digest
from fl_privacy.metrics.images import MSE, PSNR, SSIM
from fl_privacy.metrics.labels import LabelAccuracy
from fl_privacy.protocols import Metric
from fl_privacy.recording import Manifest, RecordingWriter
from fl_privacy.result_rows import scores
from fl_privacy.results import Cell, MetricInfo, ResultConfig, ResultWriter
from fl_privacy.run_folder import RunFolder
from fl_privacy.testing import toy_model
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import LocalTraining, Observation, Outcome, Reconstruction, Samples, Task

METRICS: dict[str, Metric] = {
    "psnr": PSNR(),
    "ssim": SSIM(),
    "mse": MSE(),
    "label_accuracy": LabelAccuracy(),
}
INFOS = tuple(
    MetricInfo(name=name, unit=metric.unit, higher_is_leakier=metric.higher_is_leakier)
    for name, metric in METRICS.items()
)


@dataclass(frozen=True)
class Target:
    """What the run holds of one update: its key, who sent it, and the truth."""

    key: str
    round: int
    node: str
    defense: str
    truth: Samples


@dataclass
class SyntheticRun:
    """A run folder under construction."""

    path: Path
    targets: list[Target]
    audit: bool
    task: Task

    def add_results(
        self,
        name: str,
        guess: Callable[[int, Target], Tensor | str],
        *,
        oracle: tuple[str, ...] = (),
        adversary: str = "",
        defense: str | None = None,
        settings: dict[str, JsonValue] | None = None,
        unit: Literal["update", "client", "aggregate"] = "update",
        told: str = "",
        adaptation: str = "",
        auxiliary: str = "",
        metrics: Sequence[str] = tuple(METRICS),
    ) -> Path:
        """Write a result set; ``guess`` gives inputs, or the reason of a failure."""
        held = "digits" if name == "baseline" else auxiliary
        labels: Literal["oracle", "inferred"] = "oracle" if oracle else "inferred"
        model = ThreatModel(labels=labels, auxiliary=held, unit=unit, defense=told)
        config = ResultConfig(
            name=name,
            adversary=adversary or name,
            settings=settings or {},
            task=self.task,
            model="mlp",
            threat_model=model.model_dump(mode="json"),
            seed=3,
            device="cpu",
            width=8,
            recording_digest="ab" * 32,
            code_digest="cd" * 32,
            metrics=tuple(info for info in INFOS if info.name in metrics),
            oracle=oracle,
            adaptation=adaptation,
            versions={"torch": torch.__version__},
        )
        folder = RunFolder(self.path).results / config.folder_name
        with ResultWriter.open(folder, config) as writer:
            self._write(writer, config, guess, defense)
        return folder

    def _write(
        self,
        writer: ResultWriter,
        config: ResultConfig,
        guess: Callable[[int, Target], Tensor | str],
        defense: str | None,
    ) -> None:
        for i, target in enumerate(self.targets):
            made = guess(i, target)
            seen = Observation(target.key, (), toy_model, self.task)
            row: dict[str, Cell] = {
                "key": target.key,
                "attempt": 1,
                "round": target.round,
                "rounds": str(target.round),
                "node": target.node,
                "images": len(target.truth),
                "defense": target.defense if self.audit and defense is None else defense,
                "labels": "oracle" if config.oracle else "inferred",
            }
            if isinstance(made, str):
                writer.write_chunk([{**row, "status": "failed", "message": made}], {})
                continue
            result = Reconstruction(
                target.key, made, target.truth.labels, Outcome("completed"), 0.01, 0.5
            )
            if self.audit:
                made_of = scores(METRICS, result, target.truth, seen)
                row |= {info.name: made_of[info.name] for info in config.metrics}
            row |= {"status": "completed", "message": "", "loss": 0.01, "seconds": 0.5}
            writer.write_chunk([row], {target.key: result})
        writer.finish()


@pytest.fixture
def synthetic_run(tmp_path: Path) -> Callable[..., SyntheticRun]:
    """Make a run folder with a real recording, and truth if it is an audit."""

    def make(
        *,
        clients: int = 4,
        rounds: int = 2,
        batch: int = 1,
        node: str = "client{}",
        audit: bool = True,
        defense: str = "gaussian_noise(scale=0.1)",
        lost: str = "",
        data: Samples | None = None,
        task: Task | None = None,
        model: str = "mlp",
        limit: int = 0,
    ) -> SyntheticRun:
        folder = RunFolder(tmp_path / "run")
        samples = data or Digits().load("test", torch.arange(64))
        task = task or Digits().task()
        manifest = Manifest(
            created="2026-01-01T00:00:00+00:00",
            model=model,
            dataset="digits",
            task=task,
            local_training=LocalTraining(lr=0.1, batch_size=batch),
            run_config={"seed": 3, "num-server-rounds": rounds, "record-clients": limit},
            versions={"torch": torch.__version__},
            code_digest="cd" * 8,
        )
        targets: list[Target] = []
        with RecordingWriter.open(folder.recording, manifest) as writer:
            vault = TruthVault(folder.truth)
            for r in range(1, rounds + 1):
                _, sent = writer.put_global({"w": np.full((2, 2), r, dtype=np.float32)})
                for c in range(clients):
                    n = len(targets)
                    pick = torch.arange(n * batch, (n + 1) * batch) % len(samples)
                    truth = Samples(samples.inputs[pick], samples.labels[pick])
                    sender = node.format(c)
                    entry = writer.append(
                        round=r,
                        node=sender,
                        arrays={"w": np.full((2, 2), n, dtype=np.float32)},
                        num_examples=batch,
                        global_digest=sent,
                    )
                    guarded = defense if c >= clients // 2 else ""
                    if audit:
                        at = writer.attempt
                        vault.write(
                            attempt=at, round=r, node=sender, step=0, samples=truth, indices=pick
                        )
                        vault.write_defense(
                            attempt=at, round=r, node=sender, spec=guarded, stats={}
                        )
                    key = digest("update", entry.sha256)
                    targets.append(Target(key, r, entry.node, guarded, truth))
                if lost:
                    writer.append(
                        round=r,
                        node="gone",
                        arrays=None,
                        num_examples=None,
                        global_digest=sent,
                        status=f"error: {lost}",
                    )
                writer.end_round(r)
        history = [{"round": r, "accuracy": 0.1 + 0.1 * r, "n": 360} for r in range(rounds + 1)]
        folder.history.write_text("".join(json.dumps(line) + "\n" for line in history))
        return SyntheticRun(folder.path, targets, audit, task)

    return make

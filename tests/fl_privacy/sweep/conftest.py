"""Tools of a sweep that invent simulations and attacks, and count them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_privacy.adaptive_command import Adaptive
from fl_privacy.component import ComponentError
from fl_privacy.datasets.digits import Digits
from fl_privacy.exchanges import digest
from fl_privacy.metrics.images import MSE, PSNR
from fl_privacy.plan import AnalysisError, Plan
from fl_privacy.recording import Manifest, RecordingWriter
from fl_privacy.results import MetricInfo, ResultConfig, ResultSet, ResultWriter
from fl_privacy.run_folder import RunFolder
from fl_privacy.simulation import RayTimeoutError
from fl_privacy.sweep.command import Request
from fl_privacy.sweep.running import Told
from fl_privacy.sweep.stages import Stage
from fl_privacy.truth import TruthVault
from fl_privacy.types import Outcome, Reconstruction, Samples

INFOS = tuple(
    MetricInfo(name=name, unit=metric.unit, higher_is_leakier=metric.higher_is_leakier)
    for name, metric in (("mse", MSE()), ("psnr", PSNR()))
)
SWEEP = """
title = "Two <defenses>"
reference = "noise"
[run]
dataset = "digits"
model = "mlp"
num-server-rounds = 4
[train]
[record]
num-server-rounds = 1
[defenses.none]
[defenses.noise]
spec = "gaussian_noise(scale={strength})"
strengths = [0.1, 0.2]
[defenses."<b>clip"]
spec = "per_sample_clipping(max_norm={strength})"
strengths = [1]
[[attacks]]
adversary = "analytic"
adaptive = true
"""


@dataclass
class FakeTools:
    """Invents a run of some clients; a stronger defense costs accuracy and raises the error.

    Ray does not start in the first ``late`` simulations.

    ``interrupt`` names a step, such as "train 2" for the third training, in the middle of which
    Ctrl-C comes; ``refuse`` a defense that cannot be simulated; in the first ``lossy`` recordings
    a client fails.
    """

    targets: int = 3
    interrupt: str = ""
    refuse: str = "-"
    late: int = 0
    lossy: int = 0
    done: list[str] = field(default_factory=list)
    device: str = "cpu"

    def simulate(self, stage: Stage, out: Path, told: Told) -> None:
        """Write what a simulation leaves."""
        number = Counter(self.done)[stage.kind]
        settings = stage.parsed
        if self.late:
            self.late -= 1
            raise RayTimeoutError("Ray did not start in time")
        if settings.client_defense.startswith(self.refuse):
            raise ComponentError("refused")
        folder, rounds = RunFolder(out), settings.num_server_rounds
        samples, vault = Digits().load("test", torch.arange(self.targets)), TruthVault(folder.truth)
        manifest = Manifest(model="mlp", dataset="digits", task=Digits().task())
        with RecordingWriter.open(folder.recording, manifest) as writer:
            _, sent = writer.put_global({"w": np.zeros(2, dtype=np.float32)})
            for i in range(self.targets):
                arrays = {"w": np.full(2 + round(100 * strength(stage)), i, dtype=np.float32)}
                entry = writer.append(
                    round=1, node=str(i), arrays=arrays, num_examples=1, global_digest=sent
                )
                held = torch.tensor([i])
                one = Samples(samples.inputs[held], samples.labels[held])
                where: dict[str, Any] = {"attempt": 1, "round": 1, "node": entry.node}
                vault.write(**where, step=0, samples=one, indices=held)
                stats = {"norm": strength(stage) * (i + 1), "samples": 3.0}
                vault.write_defense(**where, spec=settings.client_defense, stats=stats)
            if stage.kind == "record" and self.lossy:
                self.lossy -= 1
                lost = "error: out of memory"
                writer.append(round=1, node="9", arrays=None, num_examples=None,
                              global_digest=sent, status=lost)  # fmt: skip
        if self.interrupt == f"{stage.kind} {number}":
            raise KeyboardInterrupt
        folder.model.write_bytes(b"parameters")
        accuracy = 0.9 - strength(stage) - 0.01 * settings.seed
        lines = [
            {"attempt": 1, "round": r, "accuracy": accuracy * r / rounds, "loss": 2.0 / (r + 1),
             "n": 100, "seconds": 10.0 + r * r}
            for r in range(rounds + 1)
        ]  # fmt: skip
        folder.history.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.done.append(stage.kind)

    def adaptive_plans(self, run: Path, plan: Plan, most: int | None) -> Adaptive:
        """One adaptation, one that is refused, and one that cannot be made."""
        told, refused = (plan.model_copy(update={"adaptation": how}) for how in ("told", "refused"))
        plans = [("plain", plan), ("told", told), ("hopeless", refused)]
        return Adaptive(plans, [("impossible", "it needs <several> rounds")])

    def attack(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """The truth with an error that the defense raises and knowing it lowers."""
        if plan.adaptation == "refused":
            raise AnalysisError("no target has a label")
        if self.interrupt == f"attack {Counter(self.done)['attack']}":
            raise KeyboardInterrupt
        self.done.append("attack")
        known = 0.5 if plan.adaptation else 1.0
        return self._results(run, plan, "analytic", known * error_of(run))

    def guess(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """A guess."""
        return self._results(run, plan, "baseline", 0.2)

    def _results(self, run: Path, plan: Plan, name: str, error: float) -> ResultSet:
        config = ResultConfig(
            name=name, adversary=f"{name}{plan.adaptation}", task=Digits().task(),
            threat_model={}, seed=plan.seed,
            device="cpu", width=1, recording_digest="", metrics=INFOS, adaptation=plan.adaptation,
        )  # fmt: skip
        folder = RunFolder(run).results / config.folder_name
        samples = Digits().load("test", torch.arange(self.targets))
        with ResultWriter.open(folder, config) as writer:
            for i in range(self.targets):
                key = digest("update", str(i))
                if key in writer.done:
                    continue
                made = Reconstruction(
                    key, samples.inputs[[i]] * 0.5, samples.labels[[i]], Outcome("completed"), 0, 0
                )
                row: dict[str, Any] = {"key": key, "attempt": 1, "round": 1, "rounds": "1",
                                       "node": str(i), "images": 1, "status": "completed",
                                       "mse": error * (1 + 0.1 * i), "psnr": 10.0}  # fmt: skip
                writer.write_chunk([row], {key: made})
            writer.finish()
        return ResultSet(folder)


def strength(stage: Stage) -> float:
    """The number in a spec such as ``gaussian_noise(scale=0.1)``; 0 without a defense."""
    digits = stage.parsed.client_defense.rpartition("=")[2].rstrip(")")
    return min(float(digits), 0.5) if digits else 0.0


def error_of(run: Path) -> float:
    """An error that grows with the size of the updates, which the strength sets."""
    files = sorted((run / "recording" / "updates").rglob("*.safetensors"))
    return 0.001 + files[0].stat().st_size / 1e4


Sweeping = Callable[..., Request]


@pytest.fixture
def request_of(tmp_path: Path) -> Sweeping:
    """Make a request for a sweep file's text."""

    def make(text: str = SWEEP, **options: Any) -> Request:
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return Request(path, tmp_path / "out", **options)

    return make


@pytest.fixture
def tools() -> type[FakeTools]:
    """The class of the invented tools."""
    return FakeTools

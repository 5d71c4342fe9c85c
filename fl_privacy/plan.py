"""What an analysis is asked to do, and everything that decides its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from fl_privacy import component
from fl_privacy.code_digest import code_digest
from fl_privacy.component import VERSION, Component
from fl_privacy.protocols import Adversary, Metric
from fl_privacy.recording import Recording
from fl_privacy.results import MetricInfo, ResultConfig
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import PositiveInt, Task

METRICS = ("psnr", "ssim", "mse", "label_accuracy")
"""What every analysis is scored by, unless its plan says otherwise."""

PLAIN = "plain"
"""Name of the analysis that adapts to nothing, among those that know a defense."""


class AnalysisError(ValueError):
    """An analysis that cannot be run as asked."""


class Plan(Component):
    """One analysis: who attacks, knowing what, scored how."""

    adversary: Annotated[str, Field(description="adversary, as name(setting=value)")]
    threat_model: ThreatModel = ThreatModel()
    metrics: tuple[str, ...] = METRICS
    seed: int = 0
    device: Annotated[str, Field(description="cpu, cuda, cuda:1; auto: cuda if there is one")] = (
        "auto"
    )
    rounds: Annotated[str, Field(description="rounds to attack, such as 1-5,10; empty: all")] = ""
    targets: Annotated[PositiveInt | None, Field(description="first targets only; none: all")] = (
        None
    )
    nodes: Annotated[
        tuple[str, ...], Field(description="of these targets, those of these clients; empty: all")
    ] = ()
    adaptation: Annotated[
        str, Field(description="what was changed because the defense is known, and why")
    ] = ""


def config_of(
    plan: Plan,
    adversary: Adversary,
    metrics: Mapping[str, Metric],
    recording: Recording,
    task: Task,
    device: torch.device,
) -> ResultConfig:
    """What decides the numbers; the width of a batch is still open (0)."""
    assert isinstance(adversary, Component), "component.create makes nothing else"
    return ResultConfig(
        name=component.parse(plan.adversary)[0],
        adversary=component.spec_of("adversaries", adversary),
        settings=adversary.model_dump(mode="json"),
        requires=tuple(sorted(adversary.requires)),
        model=recording.manifest.model or "",
        task=task,
        threat_model=plan.threat_model.model_dump(mode="json"),
        seed=plan.seed,
        device=device.type,
        threads=torch.get_num_threads(),
        width=0,
        recording_digest=recording_digest(recording),
        code_digest=code_digest(),
        metrics=tuple(
            MetricInfo(
                name=n,
                unit=m.unit,
                higher_is_leakier=m.higher_is_leakier,
                set_level=m.set_level,
                spec=component.spec_of("metrics", m) if isinstance(m, Component) else n,
            )
            for n, m in metrics.items()
        ),
        oracle=plan.threat_model.oracles,
        adaptation=plan.adaptation,
        versions={"fl-privacy": VERSION, "torch": torch.__version__, "numpy": np.__version__},
    )


def recording_digest(recording: Recording) -> str:
    """Identity of a recording: SHA-256 of its manifest, which is written once and has an id.

    What was recorded under it is told apart target by target, whose keys are digests.
    """
    return hashlib.sha256(recording.manifest.model_dump_json().encode()).hexdigest()


def resolve_device(name: str) -> torch.device:
    """The device a user named; ``auto`` prefers CUDA.

    Raises:
        AnalysisError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise AnalysisError(f"no device {name!r}: expected auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise AnalysisError(f"device {name!r} is not available here: expected cpu or auto")
    return device

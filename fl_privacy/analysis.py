"""Recording x threat model x adversary x metrics -> results, resumable.

The truth enters here, after the attack: it is looked up only to score finished
results, or to serve as the oracle that the threat model grants openly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field

from fl_privacy import component
from fl_privacy.component import VERSION, Component
from fl_privacy.protocols import Adversary, Metric, Progress, silent
from fl_privacy.recording import Recording
from fl_privacy.results import Cell, MetricInfo, ResultConfig, ResultSet, ResultWriter, load_results
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import ThreatModel, check_requirements
from fl_privacy.truth import TruthVault
from fl_privacy.types import (
    Exchange,
    Failure,
    ModelFactory,
    Observation,
    PositiveInt,
    Reconstruction,
    Result,
    Samples,
    Task,
)

WRITE_EVERY = 32
"""Finished targets that are held back at most before they are written."""


class AnalysisError(ValueError):
    """An analysis that cannot be run as asked."""


@runtime_checkable
class Batched(Protocol):
    """An adversary that treats ``width`` targets as one batch and can choose the width."""

    width: int | None

    def plan_width(self, observations: Sequence[Observation], *, device: torch.device) -> int: ...


class Plan(Component):
    """One analysis: who attacks, knowing what, scored how."""

    adversary: Annotated[str, Field(description="adversary, as name(setting=value)")]
    threat_model: ThreatModel = ThreatModel()
    metrics: tuple[str, ...] = ("psnr", "ssim", "mse", "label_accuracy")
    seed: int = 0
    device: Annotated[str, Field(description="cpu, cuda, cuda:1; auto: cuda if there is one")] = (
        "auto"
    )
    rounds: Annotated[str, Field(description="rounds to attack, such as 1-5,10; empty: all")] = ""
    targets: Annotated[PositiveInt | None, Field(description="first targets only; none: all")] = (
        None
    )


def baseline_plan(plan: Plan, recording: Recording) -> Plan:
    """The same analysis for the adversary that guesses.

    It is granted the test split of the run's own data set, which makes its mean picture
    the strongest single guess; without a known data set it answers with a constant.
    """
    known = {"auxiliary": recording.manifest.dataset or plan.threat_model.auxiliary}
    return plan.model_copy(
        update={
            "adversary": "baseline",
            "threat_model": plan.threat_model.model_copy(update={**known, "labels": "inferred"}),
        }
    )


def analyze(
    run: Path,
    plan: Plan,
    *,
    model: ModelFactory | None = None,
    model_name: str = "",
    task: Task | None = None,
    progress: Progress = silent,
) -> ResultSet:
    """Attack the recording of ``run`` and write ``results/``; done targets are not repeated.

    ``model`` (named ``model_name``) and ``task`` replace those of the manifest.

    Raises:
        ThreatModelError, RecordingError, ComponentError: refused before any work.
    """
    folder = RunFolder(run)
    recording = Recording(folder.recording)
    vault = TruthVault(folder.truth)
    observations = plan.threat_model.observe(
        recording,
        model=model,
        task=task,
        oracle=(lambda e: vault.samples([e]).labels) if folder.truth.exists() else None,
        rounds=plan.rounds,
    )[: plan.targets]
    adversary: Adversary = component.create("adversaries", plan.adversary)
    name, _ = component.parse(plan.adversary)
    check_requirements(adversary.requires, observations[0], name)
    metrics: dict[str, Metric] = {m: component.create("metrics", m) for m in plan.metrics}
    device = resolve_device(plan.device)
    config = ResultConfig(
        name=name,
        adversary=component.spec_of("adversaries", adversary),  # type: ignore[arg-type]
        model=model_name or recording.manifest.model or "",
        threat_model=plan.threat_model.model_dump(mode="json"),
        seed=plan.seed,
        device=device.type,
        width=0,
        recording_digest=recording_digest(recording),
        metrics=tuple(
            MetricInfo(name=n, unit=m.unit, higher_is_leakier=m.higher_is_leakier)
            for n, m in metrics.items()
        ),
        oracle=plan.threat_model.oracles,
        versions={"fl-privacy": VERSION, "torch": torch.__version__, "numpy": np.__version__},
    )
    if isinstance(adversary, Batched):
        width = adversary.width or stored_width(run, config)
        width = width or adversary.plan_width(observations, device=device)
        config = config.model_copy(update={"width": width})
        adversary = adversary.model_copy(update={"width": width})  # type: ignore[attr-defined]
    writer = ResultWriter.open(folder.results / config.folder_name, config)
    pending = [o for o in observations if o.key not in writer.done]
    results = adversary.attack(pending, seed=plan.seed, device=device, progress=progress)
    write_results(writer, pending, results, metrics, vault)
    writer.finish()
    return ResultSet(folder.results / config.folder_name)


def write_results(
    writer: ResultWriter,
    observations: Sequence[Observation],
    results: Iterator[Result | Failure],
    metrics: Mapping[str, Metric],
    vault: TruthVault,
) -> None:
    """Score and write results as they come; what is finished survives an interruption."""
    rows: list[dict[str, Cell]] = []
    pictures: dict[str, Reconstruction] = {}

    def flush() -> None:
        if rows:
            writer.write_chunk(rows, pictures)
        rows.clear()
        pictures.clear()

    try:
        for observation, result in zip(observations, results, strict=True):
            rows.append(row(observation, result, metrics, vault))
            if isinstance(result, Reconstruction):
                pictures[result.key] = result
            if len(rows) >= WRITE_EVERY:
                flush()
    finally:
        flush()


def row(
    observation: Observation,
    result: Result | Failure,
    metrics: Mapping[str, Metric],
    vault: TruthVault,
) -> dict[str, Cell]:
    """One line of the result table."""
    exchange = observation.exchanges[-1]
    members = members_of(observation)
    audited = all(vault.has(e) for e in members)
    line: dict[str, Cell] = {
        "key": observation.key,
        "attempt": exchange.attempt,
        "round": exchange.round,
        "node": exchange.node,
        "images": sum(e.num_examples or 0 for e in observation.exchanges),
        "defense": defense_of(members, vault) if audited else None,
        "labels": "inferred" if observation.labels is None else "oracle",
    }
    if isinstance(result, Failure):
        return {**line, "status": "failed", "message": result.reason}
    line |= {"status": result.outcome.status, "message": result.outcome.message}
    line |= {"seconds": result.seconds, "loss": getattr(result, "loss", None)}
    if audited:
        truth = vault.samples(members)
        line |= {n: score(metric, result, truth) for n, metric in metrics.items()}
    return line


def members_of(observation: Observation) -> list[Exchange]:
    """The exchanges whose truth is behind a target: those of an aggregate one by one."""
    return [replace(e, node=node) for e in observation.exchanges for node in e.node.split("+")]


def score(metric: Metric, result: Result, truth: Samples) -> float | None:
    """One result against its truth; None for a metric that needs the whole set."""
    return None if metric.set_level else float(metric.score([result], [truth])[0])


def defense_of(exchanges: Sequence[Exchange], vault: TruthVault) -> str:
    """The defenses behind a target, as its clients wrote them down in the audit; "" is none."""
    found = sorted({vault.defense(e) for e in exchanges})
    return found[0] if len(found) == 1 else ", ".join(spec or "none" for spec in found)


def stored_width(run: Path, config: ResultConfig) -> int | None:
    """The width of an earlier part of the same analysis, so that going on changes no bit."""
    wanted: dict[str, Any] = {**config.identity(), "width": None}
    for held in load_results(run):
        if {**held.config.identity(), "width": None} == wanted:
            return held.config.width
    return None


def recording_digest(recording: Recording) -> str:
    """Identity of a recording: SHA-256 of its manifest, which is written once."""
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

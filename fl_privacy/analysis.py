"""Recording x threat model x adversary x metrics -> results, resumable.

The truth enters here, after the attack: it is looked up only to score finished
results, or to serve as the oracle that the threat model grants openly. Before an attack
it can only be refused, when it is not what the task describes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from fl_privacy import component
from fl_privacy.metrics.preparing import check_observed, prepared_metrics
from fl_privacy.plan import METRICS, AnalysisError, Plan, config_of, resolve_device
from fl_privacy.property_facts import facts_of
from fl_privacy.protocols import Adversary, Inferring, Metric, OfProperty, Progress, silent
from fl_privacy.recording import Recording
from fl_privacy.result_rows import members_of, row
from fl_privacy.results import (
    Cell,
    ResultConfig,
    ResultSet,
    ResultWriter,
    load_results,
    nodes_of,
)
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import check_requirements
from fl_privacy.truth import TruthVault
from fl_privacy.truth_check import check_truth
from fl_privacy.types import (
    Failure,
    ModelFactory,
    Observation,
    Reconstruction,
    Result,
    Task,
)

WRITE_EVERY = 32
"""Finished targets that are held back at most before they are written."""


@runtime_checkable
class Batched(Protocol):
    """An adversary that treats ``width`` images as one batch and can choose the width."""

    width: int | None

    def plan_width(self, observations: Sequence[Observation], *, device: torch.device) -> int: ...


@dataclass(frozen=True)
class Job:
    """An analysis past all refusals: what is left is the work."""

    folder: Path
    config: ResultConfig
    adversary: Adversary
    observations: Sequence[Observation]
    metrics: Mapping[str, Metric]
    vault: TruthVault
    device: torch.device


def analyze(
    run: Path,
    plan: Plan,
    *,
    model: ModelFactory | None = None,
    model_name: str = "",
    task: Task | None = None,
    progress: Progress = silent,
) -> ResultSet:
    """`prepare`, then `execute`."""
    job = prepare(run, plan, model=model, model_name=model_name, task=task)
    return execute(job, progress=progress)


def prepare(
    run: Path,
    plan: Plan,
    *,
    model: ModelFactory | None = None,
    model_name: str = "",
    task: Task | None = None,
) -> Job:
    """Everything that can refuse an analysis of ``run``, before any work and any file.

    ``model`` (named ``model_name``) and ``task`` replace those of the manifest.

    Raises:
        ThreatModelError, RecordingError, ComponentError, DatasetError, MetricError,
            TruthError, AnalysisError: why not.
    """
    folder = RunFolder(run)
    recording, vault = Recording(folder.recording), TruthVault(folder.truth)
    observations = plan.threat_model.observe(
        recording,
        model=model,
        task=task,
        oracle=(lambda e: vault.samples(members_of([e]), inputs=False).labels)
        if folder.truth.exists()
        else None,
        rounds=plan.rounds,
    )[: plan.targets]
    observations = of_nodes(observations, plan.nodes)
    adversary: Adversary = component.create("adversaries", plan.adversary)
    name = component.parse(plan.adversary)[0]
    check_requirements(adversary.requires, observations[0], plan.threat_model, name)
    check_truth(observations, vault)
    specs = plan.metrics
    if isinstance(adversary, Inferring):
        adversary.check(observations)
        own = adversary.scored_by(observations[0])
        specs = tuple(dict.fromkeys((*own, *(m for m in specs if m not in METRICS))))
    device, known = resolve_device(plan.device), observations[0].task
    metrics = prepared_metrics(specs, recording.manifest.dataset or "", known)
    check_observed(metrics.values(), observations[0])
    config = config_of(plan, adversary, metrics, recording, known, device)
    relation = None
    if isinstance(adversary, OfProperty):
        relation = facts_of(observations[0].auxiliary, adversary.property)
    config = config.model_copy(update={"model": model_name or config.model, "relation": relation})
    if isinstance(adversary, Batched):
        width = adversary.width or stored_width(run, config)
        if width is None:
            seen = plan.threat_model.model_copy(update={"labels": "inferred", "auxiliary": ""})
            everything = seen.observe(recording, model=model, task=task)
            width = adversary.plan_width(everything, device=device)
        config = config.model_copy(update={"width": width})
        adversary = adversary.model_copy(update={"width": width})  # type: ignore[attr-defined]
    results = folder.results / config.folder_name
    return Job(results, config, adversary, observations, metrics, vault, device)


def of_nodes(observations: list[Observation], nodes: Collection[str]) -> list[Observation]:
    """The targets behind which there are none but these clients; all when none is named.

    Raises:
        AnalysisError: no target is left.
    """
    if not nodes:
        return observations
    found = [o for o in observations if set(nodes_of(o.exchanges[-1].node)) <= set(nodes)]
    if not found:
        held = sorted({o.exchanges[-1].node for o in observations})
        raise AnalysisError(f"no target of {', '.join(nodes)}: expected some of {', '.join(held)}")
    return found


def execute(job: Job, *, progress: Progress = silent, wait: bool = False) -> ResultSet:
    """Attack and write the results of ``job``, which are returned; what is done is not repeated.

    What was attacked before there was a truth, as when a client's came later, is scored now. The
    files in its folder hold every target that was ever attacked in this way. ``wait`` for
    another process that is writing them, instead of refusing.

    Raises:
        ResultError: the folder cannot be written, or another process is writing it.
    """
    with ResultWriter.open(job.folder, job.config, wait=wait) as writer:
        writer.replace(scored_late(job))
        pending = [o for o in job.observations if o.key not in writer.done]
        results = job.adversary.attack(
            pending, seed=job.config.seed, device=job.device, progress=progress
        )
        write_results(writer, pending, results, job.metrics, job.vault)
        writer.finish()
    return ResultSet(job.folder, frozenset(o.key for o in job.observations))


def scored_late(job: Job) -> dict[str, dict[str, Cell]]:
    """New rows, by key, of reconstructions that were written without a truth that is there now."""
    held = ResultSet(job.folder)
    written = {line["key"]: line for line in held.rows()}
    found: dict[str, dict[str, Cell]] = {}
    for observation in job.observations:
        line = written.get(observation.key)
        if line is None or any(line[name] is not None for name in ("defense", *job.metrics)):
            continue
        if not all(map(job.vault.has, members_of(observation.exchanges))):
            continue
        if made := held.reconstruction(observation.key):
            found[observation.key] = row(observation, made, job.metrics, job.vault)
        elif line["status"] == "failed":
            failure = Failure(observation.key, line["message"])
            found[observation.key] = row(observation, failure, job.metrics, job.vault)
    return found


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


def stored_width(run: Path, config: ResultConfig) -> int | None:
    """The width of an earlier part of the same analysis, so that going on changes no bit."""
    wanted: dict[str, Any] = {**config.identity(), "width": None}
    for held in load_results(run):
        if {**held.config.identity(), "width": None} == wanted:
            return held.config.width
    return None

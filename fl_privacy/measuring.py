"""Recording x layer metrics x samples -> measurements, resumable.

A metric is measured at the global model that a round's clients were sent; each round that is
asked for is a measurement of its own, or all of them are one (``together``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from fl_privacy import component
from fl_privacy.code_digest import code_digest
from fl_privacy.component import VERSION, Component
from fl_privacy.layer_choice import LeftOut, chosen
from fl_privacy.layer_data import NOTHING, LayerData, audit_data, auxiliary_data
from fl_privacy.layer_results import (
    MeasureConfig,
    Measurement,
    keys_digest,
    measured_before,
    measurement,
    write_measurement,
)
from fl_privacy.plan import AnalysisError, recording_digest, resolve_device
from fl_privacy.property_facts import facts_of
from fl_privacy.protocols import LayerMetric, Progress, silent
from fl_privacy.recording import Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.truth_check import check_truth
from fl_privacy.types import ModelFactory, Observation, Task


class MeasurePlan(Component):
    """Which layer metrics, at which recorded global models, on whose samples."""

    metrics: Annotated[
        tuple[str, ...], Field(description="layer metrics; none: all that the data allows")
    ] = ()
    threat_model: ThreatModel = ThreatModel()
    auxiliary: Annotated[
        str, Field(description="dataset, or file *.npz; or the threat model's")
    ] = ""
    audit: Annotated[bool, Field(description="measure on the clients' own samples")] = False
    rounds: Annotated[str, Field(description="rounds, such as 1-5,10; empty: the last one")] = ""
    together: Annotated[bool, Field(description="one measurement over all of these rounds")] = False
    seed: int = 0
    device: Annotated[str, Field(description="cpu, cuda, cuda:1; auto: cuda if there is one")] = (
        "auto"
    )


@dataclass(frozen=True)
class MeasureJob:
    """One measurement past all refusals that need no work; ``asked``: the user named the metric."""

    run: Path
    config: MeasureConfig
    metric: LayerMetric
    observations: Sequence[Observation]
    data: LayerData
    device: torch.device
    asked: bool


def prepare_measurements(
    run: Path,
    plan: MeasurePlan,
    *,
    model: ModelFactory | None = None,
    model_name: str = "",
    task: Task | None = None,
) -> tuple[list[MeasureJob], list[LeftOut]]:
    """The measurements of a plan, after everything that can refuse them without work.

    Beside them what cannot be measured of all that is installed, when the plan names nothing.

    Raises:
        ThreatModelError, RecordingError, ComponentError, DatasetError, PropertyError, TruthError,
            AnalysisError: why not.
    """
    if plan.audit and plan.auxiliary:
        raise AnalysisError("expected --auxiliary or --audit, got both: choose whose samples")
    recording, vault = Recording(RunFolder(run).recording), TruthVault(RunFolder(run).truth)
    groups = observed(recording, plan, model, task)
    every = [o for group in groups for o in group]
    known, device = every[0].task, resolve_device(plan.device)
    spec = plan.auxiliary or plan.threat_model.auxiliary
    if plan.audit:
        check_truth(every, vault)
    held = auxiliary_data(spec, known) if spec and not plan.audit else NOTHING
    data = [audit_data(group, vault) if plan.audit else held for group in groups]
    metrics, left_out = chosen(plan.metrics, data[0])
    name = model_name or recording.manifest.model or ""
    jobs = [
        MeasureJob(
            run=run,
            config=_config(plan, metric, used, group, recording, name, device),
            metric=metric,
            observations=group,
            data=used,
            device=device,
            asked=bool(plan.metrics),
        )
        for group, own in zip(groups, data, strict=True)
        for metric in metrics
        for used in [NOTHING if metric.needs == "updates" else own]
    ]
    return jobs, left_out


def observed(
    recording: Recording, plan: MeasurePlan, model: ModelFactory | None, task: Task | None
) -> list[list[Observation]]:
    """The usable targets of each round that is wanted, in the order of recording.

    Raises:
        AnalysisError: no reply of these rounds can be used.
    """
    found = plan.threat_model.observe(recording, model=model, task=task, rounds=plan.rounds)
    groups: dict[tuple[int, int], list[Observation]] = {}
    for observation in found:
        last = observation.exchanges[-1]
        groups.setdefault((last.attempt, last.round), []).append(observation)
    if not plan.rounds:
        groups = dict([list(groups.items())[-1]])
    usable = [[o for o in g if not any(e.flaw for e in o.exchanges)] for g in groups.values()]
    usable = [group for group in usable if group]
    if not usable:
        flaw = next(e.flaw for g in groups.values() for o in g for e in o.exchanges if e.flaw)
        raise AnalysisError(f"no reply of these rounds can be used, the first because {flaw}")
    return [[o for group in usable for o in group]] if plan.together else usable


def _config(
    plan: MeasurePlan,
    metric: LayerMetric,
    data: LayerData,
    group: Sequence[Observation],
    recording: Recording,
    model: str,
    device: torch.device,
) -> MeasureConfig:
    assert isinstance(metric, Component), "component.create makes nothing else"
    last, settings = [o.exchanges[-1] for o in group], metric.model_dump(mode="json")
    return MeasureConfig(
        metric=component.spec_of("layer_metrics", metric),
        name=component.name_of("layer_metrics", metric),
        settings=settings,
        needs=metric.needs,
        source=data.source,
        data=data.name,
        data_digest=data.digest,
        samples=len(data.samples) if data.samples else 0,
        rounds=tuple(dict.fromkeys(f"{e.attempt}:{e.round}" for e in last)),
        updates=len(group),
        targets_digest=keys_digest([o.key for o in group]),
        model=model,
        task=group[0].task,
        threat_model=plan.threat_model.model_dump(mode="json"),
        seed=plan.seed,
        device=device.type,
        threads=torch.get_num_threads(),
        recording_digest=recording_digest(recording),
        code_digest=code_digest(),
        versions={"fl-privacy": VERSION, "torch": torch.__version__, "numpy": np.__version__},
        relation=facts_of(data.samples, str(settings.get("property") or ""))
        if metric.needs == "property"
        else None,
    )


def measure(job: MeasureJob, *, progress: Progress = silent) -> Measurement:
    """Measure and write one job; one that the run holds already is read instead.

    Raises:
        LayerMetricError: the metric refuses the observations or samples.
        LayerResultError: it cannot be written, or the metric broke its protocol.
    """
    if (held := measured_before(job.run, job.config)) is not None:
        return held
    start = time.perf_counter()
    scores = job.metric.measure(
        job.observations,
        job.data.samples,
        seed=job.config.seed,
        device=job.device,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    found = measurement(job.config, scores, seconds, auxiliary=job.data.given)
    write_measurement(job.run, found)
    return found

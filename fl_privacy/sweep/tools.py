"""The real tools of a sweep: Flower's simulation and the offline analysis; and its preflight."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fl_privacy import component, simulation
from fl_privacy.adaptive_command import Adaptive
from fl_privacy.analysis import execute, prepare
from fl_privacy.baseline_job import prepare_baseline
from fl_privacy.component import ComponentError
from fl_privacy.layer_results import FOLDER
from fl_privacy.layers import LayerMetricError
from fl_privacy.measuring import MeasureJob, MeasurePlan, measure, prepare_measurements
from fl_privacy.plan import Plan, resolve_device
from fl_privacy.preflight import prepare as rehearse
from fl_privacy.protocols import Progress
from fl_privacy.results import ResultSet
from fl_privacy.run_folder import RunFolder
from fl_privacy.sweep.adapting import plans_of
from fl_privacy.sweep.running import Step, Told
from fl_privacy.sweep.stages import Stage

TELL_SECONDS = 0.2


@dataclass(frozen=True)
class RealTools:
    """Simulations with the given resources a client, attacks on ``device``.

    ``say`` hears at once that a signal stops Flower, which takes seconds; it stays behind when
    the tools are sent to another process.
    """

    device: str = "auto"
    resources: Mapping[str, float | None] = field(default_factory=dict)
    say: Callable[[str], None] = lambda words: None

    def __reduce__(self) -> tuple[type[RealTools], tuple[str, Mapping[str, float | None]]]:
        return RealTools, (self.device, self.resources)

    def simulate(self, stage: Stage, out: Path, told: Told) -> None:
        """Run a stage with Flower."""

        def hear(line: str) -> None:
            if reached := simulation.round_of(line):
                told(f"round {reached[0]}/{reached[1]}")

        told("starting Flower")
        resources: dict[str, object] = dict(self.resources)
        simulation.simulate(
            stage.config,
            out=out,
            clients=stage.clients,
            stream=hear,
            stopping=lambda: self.say("Stopping Flower ..."),
            **resources,  # type: ignore[arg-type]
        )

    def adaptive_plans(self, run: Path, plan: Plan, most: int | None) -> Adaptive:
        """The plain plan, and one for each adaptation, to the defense or to none."""
        return plans_of(run, plan, most=most)

    def attack(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Attack a recording offline; two attacks may ask for the same, side by side."""
        return execute(prepare(run, plan), progress=heard(told), wait=True)

    def guess(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Guess the same targets without looking."""
        job, _ = prepare_baseline(run, plan)
        return execute(job, progress=heard(told), wait=True)

    def measure(self, run: Path, plan: MeasurePlan, told: Told) -> list[Path]:
        """Measure each metric of a plan; what the run holds already is read.

        Raises:
            LayerMetricError: a metric refuses; names it.
        """
        jobs, _ = prepare_measurements(run, plan)
        return [measured(job, told) for job in jobs]


def measured(job: MeasureJob, told: Told) -> Path:
    """Make a measurement; the file that holds it."""
    try:
        found = measure(job, progress=heard(lambda words: told(f"{job.config.name} {words}")))
    except LayerMetricError as error:
        raise LayerMetricError(f"{job.config.metric}: {error}") from None
    return job.run / FOLDER / found.config.file_name


def heard(told: Told) -> Progress:
    """A progress that says the share done, five times a second at most."""
    last = 0.0

    def progress(done: int, total: int, *, loss: Tensor | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < TELL_SECONDS and done < total:
            return
        last = now
        told(f"{100 * done // max(total, 1)} %")

    return progress


def preflight(left: Sequence[Step], device: str) -> None:
    """Make every component that is left to be used, and rehearse a client of each simulation.

    Raises:
        ComponentError, DatasetError, AnalysisError: one cannot be used; names the point.
    """
    resolve_device(device)
    for attack in dict.fromkeys(step.attack for step in left if step.attack):
        component.create("adversaries", attack.adversary)
        for metric in attack.plan(0, device).metrics:
            component.create("metrics", metric)
    for asked in dict.fromkeys(step.measure for step in left if step.measure):
        for metric in asked.metrics:
            component.create("layer_metrics", metric)
    for spec in dict.fromkeys(held_by(step) for step in left):
        if spec and not spec.strip().lower().endswith(".npz"):
            component.create("datasets", spec)
    seen: set[str] = set()
    for step in left:
        settings = step.stage.parsed.model_copy(update={"seed": 0, "initial_model": ""})
        identity = f"{step.stage.clients} {settings.model_dump_json()}"
        if step.simulates and identity not in seen:
            seen.add(identity)
            try:
                rehearse(settings, step.stage.clients, RunFolder(step.stage.partial))
            except ComponentError as error:
                raise ComponentError(f"point {step.cell.point.name}: {error}") from None


def held_by(step: Step) -> str:
    """What names the adversary's own data in a step; empty for none."""
    if step.attack is not None:
        return step.attack.threat_model.auxiliary
    return step.measure.auxiliary if step.measure is not None else ""

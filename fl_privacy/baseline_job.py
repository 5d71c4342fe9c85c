"""The analysis that runs beside every other: the baseline's, on the same targets."""

from __future__ import annotations

from pathlib import Path

from fl_privacy import component
from fl_privacy.analysis import Job, prepare
from fl_privacy.component import Component, ComponentError
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.plan import Plan
from fl_privacy.protocols import Inferring
from fl_privacy.recording import Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import ThreatModelError
from fl_privacy.types import ModelFactory, Task

CONSTANT = (
    "The baseline guesses a constant picture, which flatters the attack: the recording names no "
    'data set. Set auxiliary = "DATASET" in the file of --threat-model for the mean of its test '
    "split; of your own data: auxiliary = \"npz(path='/data/x.npz')\""
)
"""Why the baseline is weak where nothing is known of the data, and what to do."""


def baseline_plan(plan: Plan, auxiliary: str) -> Plan:
    """The same analysis for the adversary that guesses, which holds ``auxiliary``."""
    known = {"auxiliary": auxiliary, "labels": "inferred"}
    return plan.model_copy(
        update={
            "adversary": "baseline",
            "threat_model": plan.threat_model.model_copy(update=known),
        }
    )


def prepare_baseline(
    run: Path,
    plan: Plan,
    *,
    model: ModelFactory | None = None,
    model_name: str = "",
    task: Task | None = None,
) -> tuple[Job, str]:
    """The baseline of a plan that is `prepare`d already, and why it is weaker than it could be.

    It is granted the test split of the run's own data set, which makes its mean picture
    the strongest single guess. Where that cannot be had it is left with what the plan's
    adversary holds, or else with a constant picture. An adversary that infers something else
    is compared with its own null.
    """

    adversary = component.create("adversaries", plan.adversary)
    if isinstance(adversary, Inferring):
        null = adversary.null()
        assert isinstance(null, Component), "component.create makes nothing else"
        update = {"adversary": component.spec_of("adversaries", null)}
        return prepare(
            run, plan.model_copy(update=update), model=model, model_name=model_name, task=task
        ), ""

    def holding(auxiliary: str) -> Job:
        guess = baseline_plan(plan, auxiliary)
        return prepare(run, guess, model=model, model_name=model_name, task=task)

    own = plan.threat_model.auxiliary
    dataset = Recording(RunFolder(run).recording).manifest.dataset
    if not dataset:
        return holding(own), "" if own else CONSTANT
    try:
        return holding(dataset), ""
    except (ThreatModelError, ComponentError, DatasetError) as error:
        guess = f"the mean of {own}" if own else "a constant picture"
        return holding(own), (
            f"The baseline guesses {guess}, which flatters the attack: the run's data set cannot "
            f"be used here ({error})"
        )

"""Metrics as an analysis uses them: made, and ready, before the first attack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from fl_privacy import component
from fl_privacy.protocols import Metric, ObservedMetric
from fl_privacy.types import Observation, Task


class MetricError(ValueError):
    """A metric that lacks something it scores with; the message says what to do."""


@runtime_checkable
class Preparing(Protocol):
    """A metric that needs more than results and truth, such as a download or a gallery."""

    def prepared(self, dataset: str, task: Task) -> Metric:
        """The metric, ready to score inputs of ``task``; ``dataset`` is that of the run, or "".

        Raises:
            MetricError, DatasetError, ComponentError: what it needs cannot be had.
        """
        ...


def prepared_metrics(specs: Iterable[str], dataset: str, task: Task) -> dict[str, Metric]:
    """The metrics of an analysis by their specs.

    Raises:
        MetricError, DatasetError, ComponentError: one of them cannot be used here.
    """
    made: dict[str, Metric] = {spec: component.create("metrics", spec) for spec in specs}
    return {
        spec: metric.prepared(dataset, task) if isinstance(metric, Preparing) else metric
        for spec, metric in made.items()
    }


def check_observed(metrics: Iterable[Metric], observation: Observation) -> None:
    """Let each metric that sees the network refuse it before any attack.

    Raises:
        MetricError: one of them cannot be used on it.
    """
    for metric in metrics:
        if isinstance(metric, ObservedMetric):
            metric.check_observed(observation)

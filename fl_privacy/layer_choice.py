"""Which layer metrics are measured: those that are named, or all that the data allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_privacy import component
from fl_privacy.component import ComponentError
from fl_privacy.datasets.properties import PropertyError, secret_property
from fl_privacy.layer_data import GIVE, LayerData
from fl_privacy.plan import AnalysisError
from fl_privacy.protocols import LayerMetric

LeftOut = tuple[str, str]
"""A metric, and why it is not measured."""

WANTED = {"data": "samples", "property": "samples with a property"}
"""What a metric needs, in words."""


def chosen(specs: Sequence[str], data: LayerData) -> tuple[list[LayerMetric], list[LeftOut]]:
    """The metrics of ``specs``; without any all installed that the data allows, and the rest.

    Of those about a property there is one for each property of the data.

    Raises:
        ComponentError: an unknown metric or setting.
        PropertyError: a property that the data does not have, or that all or none have.
        AnalysisError: a metric that lacks data, or none can be measured.
    """
    if specs:
        return [_made(spec, data) for spec in specs], []
    metrics: list[LayerMetric] = []
    left_out: list[LeftOut] = []
    for spec in _every(data):
        try:
            metrics.append(_made(spec, data))
        except (ComponentError, PropertyError, AnalysisError) as error:
            left_out.append((spec, str(error)))
    if not metrics:
        there = ", ".join(sorted(component.installed("layer_metrics"))) or "none"
        raise AnalysisError(f"no layer metric can be measured (installed: {there}): {GIVE}")
    return metrics, left_out


def _every(data: LayerData) -> list[str]:
    """Every installed metric by name, one about a property once for each that the data has."""
    names = tuple(data.samples.properties) if data.samples else ()
    specs: list[str] = []
    for name in sorted(component.installed("layer_metrics")):
        kind: Any = component.find("layer_metrics", name)
        of_each = [f"{name}(property={p!r})" for p in names]
        specs += of_each if kind.needs == "property" and of_each else [name]
    return specs


def _made(spec: str, data: LayerData) -> LayerMetric:
    """A metric that is ready for the data.

    Raises:
        ComponentError: an unknown metric or setting, or a setting that is missing.
        AnalysisError, PropertyError: the data, or its property, is missing.
    """
    needs = component.find("layer_metrics", component.parse(spec)[0]).needs  # type: ignore[attr-defined]
    if needs != "updates" and data.samples is None:
        raise AnalysisError(f"{spec} needs {WANTED[needs]}, and no data was given: {GIVE}")
    metric = component.create("layer_metrics", spec)
    if needs == "property" and data.samples is not None:
        found = secret_property(data.samples, metric.property, data.name)
        metric = metric.model_copy(update={"property": found.name})
    made: LayerMetric = metric
    return made

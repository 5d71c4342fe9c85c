"""Result sets as the report sees them: attacks with names, their scores brought together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_privacy.results import MetricInfo, ResultConfig, ResultSet
from fl_privacy.types import Reconstruction

Rows = Sequence[Mapping[str, Any]]

BASELINE = "baseline"
"""Name of the adversary that guesses without looking at an update."""

UNITS = {"client": ", linked rounds", "aggregate": ", aggregates"}
"""What a name says of a unit of attack other than a single update."""


@dataclass(frozen=True)
class Analysis:
    """One attack under the name it has on the page: result sets that differ only in scores.

    ``rows`` hold the scores of all of them.
    """

    label: str
    parts: tuple[ResultSet, ...]
    config: ResultConfig
    rows: Rows

    @property
    def is_baseline(self) -> bool:
        """Whether it only guesses, or is another attack's null."""
        return self.config.name == BASELINE or self.is_null

    @property
    def is_null(self) -> bool:
        """Whether what tells it anything was taken from it, for comparison."""
        return self.config.settings.get("permuted") is True

    @property
    def infers_property(self) -> bool:
        """Whether its results are scores of a property, so that there are no pictures."""
        sets = [metric.name for metric in self.config.metrics if metric.set_level]
        return any(row.get(name) is not None for row in self.rows for name in sets)

    @property
    def told(self) -> str:
        """The defense that it was told of; empty when it was not."""
        return "" if self.is_baseline else str(self.config.threat_model.get("defense") or "")

    @property
    def adaptation(self) -> str:
        """What it changed because of the defense, in a few words; empty for a plain attack."""
        return self.config.adaptation.partition(":")[0]

    def of(self, defense: str | None) -> Rows:
        """Its targets in one defense group."""
        return [row for row in self.rows if row["defense"] == defense]

    def reconstruction(self, key: str) -> Reconstruction | None:
        """What it made of a target; None when it failed or is not there."""
        made = (part.reconstruction(key) for part in self.parts)
        return next((one for one in made if one is not None), None)


def analyses(results: Sequence[ResultSet]) -> list[Analysis]:
    """Attacks with names that tell them apart, the baselines last.

    Result sets of one attack that were scored by different metrics are one attack.
    """
    grouped = merged(results)
    configs = [parts[0].config for parts in grouped]
    labels = names(configs, [parts[0].folder.name for parts in grouped])
    found = [
        Analysis(label, tuple(parts), config_of(parts), rows_of(parts))
        for label, parts in zip(labels, grouped, strict=True)
    ]
    return sorted(found, key=lambda a: (a.is_baseline, a.label))


def names(configs: Sequence[ResultConfig], folders: Sequence[str]) -> list[str]:
    """The shortest that is unique: adversary, with its unit of attack, its whole spec, its folder.

    What was adapted follows an adversary's name.
    """

    def adapted(name: str, config: ResultConfig) -> str:
        short = config.adaptation.partition(":")[0]
        return f"{name}, {short}" if short else name

    def on_units(config: ResultConfig) -> str:
        unit = str(config.threat_model.get("unit"))
        return f"{adapted(config.name, config)}{UNITS.get(unit, '')}"

    choices = [
        (adapted(c.name, c), on_units(c), adapted(c.adversary, c), folder)
        for c, folder in zip(configs, folders, strict=True)
    ]
    counts = [Counter(column) for column in zip(*choices, strict=True)]
    return [
        next((name for name, count in zip(own, counts, strict=True) if count[name] == 1), own[-1])
        for own in choices
    ]


def merged(results: Sequence[ResultSet]) -> list[list[ResultSet]]:
    """Result sets that differ in their metrics alone, together."""
    groups: dict[str, list[ResultSet]] = {}
    for result in results:
        identity = json.dumps({**result.config.identity(), "metrics": None}, sort_keys=True)
        known = groups.setdefault(identity, [])
        if any(contradict(result.config.metrics, other.config.metrics) for other in known):
            groups[f"{identity} {result.folder.name}"] = [result]
        else:
            known.append(result)
    return list(groups.values())


def contradict(some: Sequence[MetricInfo], others: Sequence[MetricInfo]) -> bool:
    """Whether two lists name different metrics alike, such as one with other settings."""
    known = {metric.name: metric for metric in others}
    return any(known.get(metric.name, metric) != metric for metric in some)


def config_of(parts: Sequence[ResultSet]) -> ResultConfig:
    """The configuration of the first, with the metrics of all."""
    metrics = {metric.name: metric for part in parts for metric in part.config.metrics}
    complete = all(part.config.complete for part in parts)
    update = {"metrics": tuple(metrics.values()), "complete": complete}
    return parts[0].config.model_copy(update=update)


def rows_of(parts: Sequence[ResultSet]) -> Rows:
    """The targets of all, each with the scores of all, by key."""
    rows: dict[str, dict[str, Any]] = {}
    for part in parts:
        for row in part.rows():
            known = rows.setdefault(row["key"], {})
            known.update({k: v for k, v in row.items() if v is not None or k not in known})
    names = [metric.name for part in parts for metric in part.config.metrics]
    return [{**dict.fromkeys(names), **rows[key]} for key in sorted(rows)]

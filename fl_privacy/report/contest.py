"""Which adversary got most from a defense group: compared under one threat model, client by client.

An auditor may pick an adversary after the fact by its mean score, and says so; never another
one for each target.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fl_privacy.report.analyses import Analysis
from fl_privacy.report.scores import Score, baseline_of, score
from fl_privacy.results_format import client_of
from fl_privacy.threat_model import ThreatModel

FREE = ("defense", "unit")
"""What may differ between rivals: knowing the defense, linking a client's updates.

Aggregates are apart: a server that sees no more is another one.
"""


@dataclass(frozen=True)
class Contest:
    """Attacks on one defense group under one threat model, the strongest first.

    ``clients`` were scored by all of ``lines``, which are ordered by the mean over these
    clients of each one's mean. ``partial`` attacks scored too few of them to be compared.
    ``setting`` is what the threat model says beyond the default, apart from `FREE`;
    ``beside_oracles``: others, with an oracle, are left out.
    """

    defense: str | None
    setting: Mapping[str, Any]
    lines: tuple[Score, ...]
    clients: int
    partial: tuple[Score, ...] = ()
    beside_oracles: bool = False

    @property
    def best(self) -> Score:
        """The strongest."""
        return self.lines[0]

    @property
    def plain(self) -> Score | None:
        """The strongest that neither knew the defense nor adapted to it."""
        return next((line for line in self.lines if not knows(line.analysis)), None)

    @property
    def adaptive(self) -> Score | None:
        """The strongest that did."""
        return next((line for line in self.lines if knows(line.analysis)), None)


def knows(analysis: Analysis) -> bool:
    """Whether an attack was told the defense, or changed because of it."""
    return bool(analysis.told or analysis.adaptation)


def contests(found: Sequence[Analysis], defense: str | None, metric: str) -> list[Contest]:
    """The contests of a defense group; those with an oracle only when there are no others."""
    groups: dict[str, list[Score]] = {}
    for analysis in found:
        info = next((m for m in analysis.config.metrics if m.name == metric), None)
        if info is None or analysis.is_baseline or not analysis.of(defense):
            continue
        line = score(analysis, defense, info, baseline_of(analysis, found, metric))
        if line.interval.n:
            groups.setdefault(rules(analysis), []).append(line)
    fair = {k: lines for k, lines in groups.items() if not lines[0].analysis.config.oracle}
    mixed = bool(fair) and len(fair) < len(groups)
    held = [contest(defense, lines) for _, lines in sorted((fair or groups).items())]
    return [replace(one, beside_oracles=mixed) for one in held]


def rules(analysis: Analysis) -> str:
    """What rivals have in common: network, task, and all of the threat model but `FREE`."""
    config = analysis.config
    task = config.task.model_dump(mode="json") if config.task else None
    return json.dumps([setting_of(analysis), config.model, task], sort_keys=True)


def setting_of(analysis: Analysis) -> dict[str, Any]:
    """What the threat model says beyond the default, apart from `FREE`."""
    default = ThreatModel().model_dump(mode="json")
    model = analysis.config.threat_model
    beyond = {k: v for k, v in model.items() if k not in FREE and default.get(k) != v}
    return beyond | ({"unit": "aggregate"} if model.get("unit") == "aggregate" else {})


def contest(defense: str | None, lines: Sequence[Score]) -> Contest:
    """Order ``lines`` by their mean over the clients that all scored.

    An attack that would cost the comparison more than half of the clients is set apart.
    """
    lines = sorted(lines, key=lambda line: line.analysis.label)
    name = lines[0].metric.name
    means = [client_means(line.analysis.of(line.defense), name) for line in lines]
    rivals, common = comparable(means)
    sign = 1 if lines[0].metric.higher_is_leakier else -1
    ranked = sorted(rivals, key=lambda i: sign * mean_over(common, means[i]), reverse=True)
    apart = [line for i, line in enumerate(lines) if i not in rivals]
    return Contest(
        defense,
        setting_of(lines[0].analysis),
        tuple(lines[i] for i in ranked),
        len(common),
        tuple(apart),
    )


def comparable(means: Sequence[Mapping[Hashable, float]]) -> tuple[list[int], set[Hashable]]:
    """Which attacks are compared, those with most clients first, and the clients that all scored.

    One that would cost the comparison more than half of the clients is left out.
    """
    ready = sorted(range(len(means)), key=lambda i: -len(means[i]))
    common = set(means[ready[0]])
    enough = (len(common) + 1) // 2
    rivals: list[int] = []
    for i in ready:
        shared = common & set(means[i])
        if len(shared) >= enough:
            common, rivals = shared, [*rivals, i]
    return rivals, common


def client_means(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[Hashable, float]:
    """The mean score of each client's targets: updates, or all its rounds as one target."""
    values: dict[Hashable, list[float]] = {}
    for row in rows:
        value = row.get(metric)
        if value is not None:
            values.setdefault(client_of(row), []).append(value)
    return {client: fmean(own) for client, own in values.items()}


def mean_over(clients: Collection[Hashable], means: Mapping[Hashable, float]) -> float:
    """The mean score over some clients, each of which counts once."""
    return fmean(means[client] for client in clients)

"""One line of the result table: a finished result, scored against the truth.

This is where the truth is looked up, after the attack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fl_privacy.metrics.auc import any_has, truth_of
from fl_privacy.metrics.matching import in_unit_range
from fl_privacy.property_rows import joined
from fl_privacy.protocols import Metric, ObservedMetric, SetMetric
from fl_privacy.results import Cell, nodes_of
from fl_privacy.results_format import HAS_PROPERTY
from fl_privacy.truth import TruthVault
from fl_privacy.types import (
    Exchange,
    Failure,
    Observation,
    PropertyScores,
    Reconstruction,
    Result,
    Samples,
)


def row(
    observation: Observation,
    result: Result | Failure,
    metrics: Mapping[str, Metric],
    vault: TruthVault,
) -> dict[str, Cell]:
    """One line of the result table."""
    exchange = observation.exchanges[-1]
    members = members_of(observation.exchanges)
    audited = all(vault.has(e) for e in members)
    line: dict[str, Cell] = {
        "key": observation.key,
        "attempt": exchange.attempt,
        "round": exchange.round,
        "rounds": ",".join(str(e.round) for e in observation.exchanges),
        "node": exchange.node,
        "images": sum(e.num_examples or 0 for e in observation.exchanges),
        "defense": defense_of(members, vault) if audited else None,
        "labels": "inferred" if observation.labels is None else "oracle",
    }
    if isinstance(result, Failure):
        return {**line, "status": "failed", "message": result.reason}
    line |= {"status": result.outcome.status, "message": result.outcome.message}
    line |= {"seconds": result.seconds, "loss": getattr(result, "loss", None)}
    line |= {
        name: joined(metric.part(result).tolist())
        for name, metric in metrics.items()
        if isinstance(metric, SetMetric) and isinstance(result, PropertyScores)
    }
    if isinstance(result, PropertyScores):
        line[HAS_PROPERTY] = joined(
            having(result.property, e, vault) for e in observation.exchanges
        )
    if audited and not all(metric.set_level for metric in metrics.values()):
        line |= scores(metrics, result, vault.samples(members), observation)
    return line


def members_of(exchanges: Iterable[Exchange]) -> list[Exchange]:
    """The exchanges whose truth is behind a target: those of an aggregate one by one."""
    return [replace(e, node=node) for e in exchanges for node in nodes_of(e.node)]


def having(name: str, exchange: Exchange, vault: TruthVault) -> bool | None:
    """Whether a batch behind an exchange has a property; None where the truth is unknown."""
    members = members_of([exchange])
    if not all(vault.has(one) for one in members):
        return None
    return any_has(truth_of(name, vault.samples([one], inputs=False)) for one in members)


def scores(
    metrics: Mapping[str, Metric], result: Result, truth: Samples, observation: Observation
) -> dict[str, float | None]:
    """One result against its truth; None where a metric needs another kind of result.

    Both are `in_unit_range`, but as they are for a metric that sees the network.
    """
    scaled, made = in_unit_range(truth, observation.task), result
    if isinstance(result, Reconstruction):
        made = in_unit_range(result, observation.task)

    def value(metric: Metric) -> float | None:
        if not isinstance(result, getattr(metric, "kinds", (Reconstruction,))):
            return None
        if isinstance(metric, ObservedMetric):
            return float(metric.score_observed([result], [truth], [observation])[0])
        return float(metric.score([made], [scaled])[0])

    return {name: value(metric) for name, metric in metrics.items() if not metric.set_level}


def defense_of(exchanges: Sequence[Exchange], vault: TruthVault) -> str | None:
    """The defenses behind a target, as its clients wrote them down in the audit; "" is none.

    None: one of them did not say.
    """
    said = {vault.defense(e) for e in exchanges}
    found = sorted(spec for spec in said if spec is not None)
    if len(found) < len(said):
        return None
    return found[0] if len(found) == 1 else ", ".join(spec or "none" for spec in found)

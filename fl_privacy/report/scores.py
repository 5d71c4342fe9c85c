"""From result rows to the numbers a reader wants: groups, means, gains, outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fl_privacy.metrics.auc import auc_difference, auc_interval
from fl_privacy.metrics.statistics import (
    Interval,
    Quartiles,
    finite,
    mean_interval,
    quartiles,
    share_interval,
)
from fl_privacy.property_rows import scored
from fl_privacy.report.analyses import BASELINE, Analysis, Rows, analyses
from fl_privacy.results import MetricInfo
from fl_privacy.results_format import client_of

__all__ = ["BASELINE", "Analysis", "Score", "analyses"]

Pair = tuple[float, float, Hashable]
"""Score and guess of a target, and the client it is of."""


@dataclass(frozen=True)
class Score:
    """One metric of one adversary in one defense group.

    ``gain`` is the mean paired difference to the baseline over targets that both
    scored, positive when the adversary leaks more, and ``guess`` what the baseline got on
    these; None for the baseline itself.
    """

    analysis: Analysis
    defense: str | None
    metric: MetricInfo
    interval: Interval
    quartiles: Quartiles
    gain: Interval | None
    guess: Interval | None
    targets: int


@dataclass(frozen=True)
class Ending:
    """How many targets of one adversary and group ended in one way."""

    adversary: str
    defense: str | None
    status: str
    message: str
    count: int


def defenses(found: Sequence[Analysis]) -> list[str | None]:
    """Defense groups: undefended (``""``), the defended ones by name, unknown (None)."""
    present = {row["defense"] for analysis in found for row in analysis.rows}
    return sorted(present, key=lambda d: (d is None, d or ""))


def baseline_of(analysis: Analysis, found: Sequence[Analysis], metric: str = "") -> Analysis | None:
    """The baseline run of the same task that guesses best and treated the same targets.

    One that was scored by ``metric`` if there is one; a mean image before a constant one,
    since it is the better guess; then the one with most of these targets, of these metrics, and
    then the one that the same code computed.
    """
    keys = {row["key"] for row in analysis.rows}
    guesses = [a for a in found if a.is_baseline and not a.is_null and a is not analysis]

    def fits(a: Analysis) -> tuple[bool, bool, bool, bool, int, int, bool]:
        shared = len(keys & {row["key"] for row in a.rows})
        return (
            a.config.task == analysis.config.task,
            shared > 0,
            any(m.name == metric for m in a.config.metrics),
            guesses_mean(a),
            shared,
            len({m.name for m in a.config.metrics} & {m.name for m in analysis.config.metrics}),
            a.config.code_digest == analysis.config.code_digest,
        )

    return max(guesses, key=fits, default=None)


def compared_with(
    analysis: Analysis, found: Sequence[Analysis], metric: MetricInfo
) -> Analysis | None:
    """What a metric of an attack is compared with: its own null, or the baseline."""
    if metric.set_level:
        return null_of(analysis, found)
    return baseline_of(analysis, found, metric.name)


def guesses_mean(analysis: Analysis) -> bool:
    """Whether a baseline answered with a mean image: it held data and was not told otherwise."""
    held = analysis.config.threat_model.get("auxiliary")
    return bool(held) and analysis.config.settings.get("guess") != "constant"


def paired(mine: Rows, baseline: Rows, metric: MetricInfo) -> list[Pair]:
    """Score and guess of every target that both scored, and whose it is."""
    guess = {row["key"]: row.get(metric.name) for row in baseline}
    pairs = [(row.get(metric.name), guess.get(row["key"]), client_of(row)) for row in mine]
    return [(s, other, client) for s, other, client in pairs if s is not None and other is not None]


def gain(pairs: Sequence[Pair], metric: MetricInfo) -> Interval:
    """Mean paired difference to the baseline, in the metric's unit; positive leaks more.

    The difference of two shares lies in [-1, 1] and so does its interval.
    """
    sign = 1.0 if metric.higher_is_leakier else -1.0
    differences = [sign * (score - other) for score, other, _ in pairs]
    clients = [client for _, _, client in pairs]
    if not metric.is_share:
        return mean_interval(differences, clients)
    half = share_interval([(1 + d) / 2 for d in differences], clients)
    return Interval(2 * half.mean - 1, 2 * half.low - 1, 2 * half.high - 1, half.n)


def interval_over(rows: Rows, metric: MetricInfo) -> Interval:
    """A metric over targets with its 95 % interval: the mean, or what the set as a whole gets."""
    if metric.set_level:
        return auc_interval(*scored(rows, metric.name))
    values = [row.get(metric.name) for row in rows]
    return interval_of(values, metric, [client_of(row) for row in rows])


def interval_of(
    values: Sequence[float | None], metric: MetricInfo, groups: Sequence[Hashable] | None = None
) -> Interval:
    """Mean with its 95 % interval: inside [0, 1] for shares, else Student's t.

    Values of one of the ``groups`` may depend on each other.
    """
    if metric.is_share:
        return share_interval(values, groups)
    return mean_interval(values, groups)


def score(
    analysis: Analysis, defense: str | None, metric: MetricInfo, baseline: Analysis | None
) -> Score:
    """Summarize one metric over a defense group."""
    rows = analysis.of(defense)
    if metric.set_level:
        return set_score(analysis, defense, metric, baseline)
    values = [row.get(metric.name) for row in rows]
    compared = baseline is not None and not analysis.is_baseline
    pairs = paired(rows, baseline.of(defense), metric) if baseline else []
    return Score(
        analysis=analysis,
        defense=defense,
        metric=metric,
        interval=interval_over(rows, metric),
        quartiles=quartiles(values),
        gain=gain(pairs, metric) if compared else None,
        guess=interval_of([p[1] for p in pairs], metric, [p[2] for p in pairs])
        if compared
        else None,
        targets=len(rows),
    )


def set_score(
    analysis: Analysis, defense: str | None, metric: MetricInfo, null: Analysis | None
) -> Score:
    """A set-level metric over a defense group, beside the attack's ``null`` on the same targets."""
    rows = analysis.of(defense)
    guess = gain = None
    if null is not None and not analysis.is_baseline:
        others = {r["key"]: r for r in null.of(defense) if r.get(metric.name) is not None}
        both = [r for r in rows if r["key"] in others and r.get(metric.name) is not None]
        mine, has, clients = scored(both, metric.name)
        theirs = scored([others[r["key"]] for r in both], metric.name).scores
        guess = auc_interval(theirs, has, clients)
        gain = auc_difference(mine, theirs, has, clients)
    return Score(
        analysis=analysis,
        defense=defense,
        metric=metric,
        interval=interval_over(rows, metric),
        quartiles=quartiles([]),
        gain=gain,
        guess=guess,
        targets=len(rows),
    )


def null_of(analysis: Analysis, found: Sequence[Analysis]) -> Analysis | None:
    """The null of an attack: the same in all but what tells it anything.

    Of several that by the same code, then on the same device, then with most of its targets.
    """
    keys = {row["key"] for row in analysis.rows}

    def told(one: Analysis) -> dict[str, object]:
        return {
            "settings": {**one.config.settings, "permuted": None},
            "threat_model": one.config.threat_model,
            "seed": one.config.seed,
        }

    def fits(one: Analysis) -> tuple[bool, bool, int]:
        return (
            one.config.code_digest == analysis.config.code_digest,
            one.config.device == analysis.config.device,
            len(keys & {row["key"] for row in one.rows}),
        )

    nulls = (a for a in found if a.is_null and a.config.name == analysis.config.name)
    return max((null for null in nulls if told(null) == told(analysis)), key=fits, default=None)


def scores(found: Sequence[Analysis], defense: str | None) -> list[Score]:
    """All scores of a defense group, adversary by adversary, the baseline last."""
    return [
        score(analysis, defense, metric, compared_with(analysis, found, metric))
        for analysis in found
        if analysis.of(defense)
        for metric in analysis.config.metrics
    ]


def endings(found: Sequence[Analysis]) -> list[Ending]:
    """How the attacks ended, counted by adversary, group, status and reason."""
    return [
        Ending(a.label, defense, status, message, count)
        for a in found
        for defense in defenses([a])
        for (status, message), count in Counter(
            (row["status"] or "unknown", row["message"] or "") for row in a.of(defense)
        ).most_common()
    ]


def scored_values(analysis: Analysis, defense: str | None, metric: str) -> list[float]:
    """The values of a metric that are numbers, by target key."""
    return [float(v) for v in finite(row.get(metric) for row in analysis.of(defense))]

"""The numbers of a sweep as lines: for the page, for the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.filesize import decimal

from fl_privacy.component import parse
from fl_privacy.metrics.statistics import Interval
from fl_privacy.report import words
from fl_privacy.results import MetricInfo
from fl_privacy.sweep.results import Adversary, Attacked, Measured

MISSING = "–"
SHOWN = ("mse", "psnr", "ssim", "label_accuracy", "identifiability", "lpips")
"""Metrics in the order of the tables; others follow."""


@dataclass(frozen=True)
class Cost:
    """What a point costs, as text, beside what it costs without a defense."""

    accuracy: str
    change: str
    seconds: str
    seconds_ratio: str
    upload: str
    upload_ratio: str


@dataclass(frozen=True)
class LeakLine:
    """One adversary of one attack on one point, metric by metric, as text."""

    attack: str
    who: str
    label: str
    kind: str
    n: str
    values: tuple[str, ...]


def undefended(found: Sequence[Measured], group: str) -> Measured | None:
    """The first point of a group that has no defense."""
    same = [m for m in found if m.point.group == group and not m.point.spec]
    return same[0] if same else None


def cost(measured: Measured, free: Measured | None) -> Cost:
    """The cost of a point and its ratio to ``free``, the undefended point."""
    own, base = measured.accuracy, free.accuracy if free else None
    other = free is not None and free is not measured
    change = (
        f"{100 * (own.mean - base.mean):+.1f} points".replace("-", "−")
        if own and base and other
        else ""
    )
    return Cost(
        accuracy=percent(own),
        change=change,
        seconds=MISSING if measured.seconds is None else f"{measured.seconds:.2f} s",
        seconds_ratio=times(measured.seconds, free.seconds if free and other else None),
        upload=MISSING if measured.upload is None else decimal(round(measured.upload)),
        upload_ratio=times(measured.upload, free.upload if free and other else None),
    )


def percent(share: Interval | None) -> str:
    """``71.2 % [69.0, 73.3]``."""
    if share is None:
        return MISSING
    said = f"{100 * share.mean:.1f} %"
    if not math.isfinite(share.low):
        return said
    return f"{said} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def times(own: float | None, base: float | None) -> str:
    """``1.43 times``; empty when one of them is unknown."""
    return f"× {own / base:.2f}" if own is not None and base else ""


def metrics_of(attacks: Sequence[Attacked]) -> list[MetricInfo]:
    """Every metric that some adversary was scored by; single layers have a section of their own."""
    found: dict[str, MetricInfo] = {}
    for attack in attacks:
        for adversary in attack.adversaries:
            own = adversary.metrics.items()
            found.update((n, m) for n, m in own if "layer" not in parse(m.spec or n)[1])
    rank = {name: i for i, name in enumerate(SHOWN)}
    return sorted(found.values(), key=lambda m: rank.get(m.name.partition("(")[0], len(rank)))


def who(attacked: Attacked) -> Iterator[tuple[str, str, Adversary]]:
    """What each adversary of an attack is called, its style, and itself; the guess is the last."""
    only = attacked.attack.adaptive and len(attacked.adversaries) == 1
    yield "plain, and no other" if only else "plain", "attack", attacked.plain
    if len(attacked.adversaries) > 1:
        count = len(attacked.adversaries)
        yield f"strongest of {count}: {attacked.strongest.label}", "attack", attacked.strongest
    if attacked.guess is not None:
        infers = any(metric.set_level for metric in attacked.guess.metrics.values())
        yield "property shuffled" if infers else "blind guess", "guess", attacked.guess


def leak_lines(measured: Measured, metrics: Sequence[MetricInfo]) -> list[LeakLine]:
    """What leaks at a point."""
    return [
        LeakLine(
            attack=attacked.attack.title,
            who=name,
            label=adversary.label,
            kind=kind,
            n=scored(adversary),
            values=tuple(_value(adversary, metric) for metric in metrics),
        )
        for attacked in measured.attacks
        for name, kind, adversary in who(attacked)
    ]


def scored(adversary: Adversary) -> str:
    """How many targets were scored, of how many."""
    names = [name for name, metric in adversary.metrics.items() if metric.set_level] or ["mse"]
    scores = [row.get(names[0]) for row in adversary.rows]
    n, targets = sum(score is not None for score in scores), len(scores)
    return str(n) if n == targets else f"{n} of {targets}"


def _value(adversary: Adversary, metric: MetricInfo) -> str:
    found = adversary.interval(metric.name)
    if found is None:
        return MISSING
    return error(found) if metric.name == "mse" else words.interval(found, metric)


def error(found: Interval) -> str:
    """A squared error with two digits that count, however small: ``0.00012 [0.00005, 0.0002]``."""
    if not math.isfinite(found.low):
        return digits(found.mean)
    return f"{digits(found.mean)} [{digits(found.low)},\u00a0{digits(found.high)}]"


def digits(value: float) -> str:
    """Two digits that count, without an exponent where that is short."""
    if not value or not math.isfinite(value):
        return "0" if value == 0 else MISSING
    places = 1 - math.floor(math.log10(abs(value)))
    text = f"{value:.{max(places, 0)}f}" if -6 < math.log10(abs(value)) < 6 else f"{value:.1e}"
    return text.replace("-", "−")


COLUMNS = (
    *("group", "defense", "strength", "spec", "seeds"),
    *("accuracy", "accuracy_low", "accuracy_high", "round_seconds", "upload_bytes", "reported"),
    *("attack", "adversary", "strongest", "metric", "unit", "mean", "low", "high", "n"),
)


def csv_text(found: Sequence[Measured]) -> str:
    """All numbers, a line for each point, adversary and metric; empty cells where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for measured in found:
        writer.writerows([*_point_cells(measured), *rest] for rest in _score_cells(measured))
    return text.getvalue()


def _point_cells(measured: Measured) -> list[object]:
    point, share = measured.point, measured.accuracy
    shares = _numbers(share)[:3] if share else [""] * 3
    seconds, upload = measured.seconds, measured.upload
    return [
        *(point.group, point.defense, point.strength, point.spec),
        " ".join(map(str, measured.seeds)),
        *shares,
        "" if seconds is None else seconds,
        "" if upload is None else upload,
        said_of(measured),
    ]


def said_of(measured: Measured) -> str:
    """What its defense reported: ``effective_rate 0.39, removed_norm 18``."""
    return ", ".join(f"{name} {digits(value)}" for name, value in measured.reported.items())


def _score_cells(measured: Measured) -> Iterator[list[object]]:
    lines = 0
    for attacked in measured.attacks:
        everyone = [*attacked.adversaries, *filter(None, [attacked.guess])]
        for adversary in everyone:
            for name, metric in adversary.metrics.items():
                found = adversary.interval(name)
                if found is None:
                    continue
                lines += 1
                best = "yes" if adversary is attacked.strongest else ""
                head: list[object] = [attacked.attack.title, adversary.label, best]
                yield [*head, name, metric.unit, *_numbers(found)]
    if not lines:
        yield [""] * 9


def _numbers(interval: Interval) -> list[object]:
    bounds = (interval.mean, interval.low, interval.high)
    return [*(value if math.isfinite(value) else "" for value in bounds), interval.n]

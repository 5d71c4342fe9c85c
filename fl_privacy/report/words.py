"""Numbers and settings in plain words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fl_privacy.component import parse
from fl_privacy.metrics.statistics import Interval, Quartiles
from fl_privacy.report.contest import Contest
from fl_privacy.report.reading import Run
from fl_privacy.report.scores import Analysis, Score
from fl_privacy.results import MetricInfo, rounds_of
from fl_privacy.types import LocalTraining

NBSP = "\u00a0"
"""A space that keeps a number on the line of its unit."""

UNITS = {
    "update": "It saw each client's update of each round on its own.",
    "client": "It saw all updates of a client together, linked over the rounds.",
    "aggregate": "It saw only the weighted mean of a round's updates (secure aggregation).",
}

RECORDED_ONLY = (
    "It saw only the weighted mean of a round's recorded updates (secure aggregation); "
    "record-clients chose which clients were recorded, so fewer are in that mean than took part."
)


def number(value: float, metric: MetricInfo, *, signed: bool = False) -> str:
    """A value in its metric's usual precision; a dash when there is none."""
    if not math.isfinite(value):
        return "–"
    digits = 1 if metric.unit == "dB" else 3 if metric.name in ("mse", "lpips") else 2
    return f"{value:{'+' if signed else ''}z.{digits}f}".replace("-", "−")


def interval(value: Interval, metric: MetricInfo, *, signed: bool = False) -> str:
    """``mean [low, high]``, dB named; the bare mean when one value gives no interval."""
    unit = f"{NBSP}dB" if metric.unit == "dB" and math.isfinite(value.mean) else ""
    mean = number(value.mean, metric, signed=signed) + unit
    if not math.isfinite(value.low):
        return mean
    low, high = (number(v, metric, signed=signed) for v in (value.low, value.high))
    return f"{mean} [{low},{NBSP}{high}]"


def spread(value: Quartiles, metric: MetricInfo) -> str:
    """Lower quartile, median, upper quartile."""
    return " / ".join(number(v, metric) for v in (value.lower, value.median, value.upper))


def metric_settings(metric: MetricInfo) -> str:
    """``gallery 'fashion-mini', size 600``; empty for a metric without settings."""
    _, settings = parse(metric.spec)
    return ", ".join(f"{plain(name)} {value!r}" for name, value in settings.items())


def metric_name(name: str) -> str:
    """``PSNR`` for ``psnr``, ``label accuracy`` for ``label_accuracy``; without settings."""
    name = name.partition("(")[0]
    return name.upper() if len(name) <= 5 else plain(name)


def plain(name: str) -> str:
    """A component's name as words, which can be broken over lines."""
    return name.replace("_", " ").replace("(", " (")


def count(n: int, noun: str, plural: str = "") -> str:
    """``1 target``, ``2 targets``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def samples(counts: Collection[int]) -> str:
    """``320 samples a client``, ``12 to 320 samples a client``."""
    low, high = min(counts), max(counts)
    return f"{count(low, 'sample') if low == high else f'{low:,} to {high:,} samples'} a client"


def group_title(defense: str | None) -> str:
    """Name of a defense group."""
    if defense is None:
        return "Defense unknown"
    return f"Defended: {defense}" if defense else "Undefended"


def group_clients(defense: str | None) -> str:
    """The clients of a defense group, inside a sentence."""
    if defense is None:
        return "clients whose defense is unknown"
    return f"clients defended by {defense}" if defense else "undefended clients"


def contest_title(contest: Contest, of: int) -> str:
    """Name of a defense group, and what the adversaries were granted if that tells it apart."""
    title = group_title(contest.defense)
    return f"{title} · {granted(contest.setting)}" if of > 1 else title


def granted(setting: Mapping[str, Any]) -> str:
    """What a threat model says beyond the default."""
    given = (f"{plain(name)} {value}" for name, value in sorted(setting.items()))
    return ", ".join(given) or "nothing granted beyond the default"


def headline(contest: Contest) -> str:
    """What the strongest attack got from one defense group, in plain words."""
    best = contest.best
    sentence = (
        f"From the updates of {group_clients(best.defense)} the server "
        f"({best.analysis.label}, {rank(contest)}) "
        f"reconstructed the inputs of {count(best.interval.n, 'target')} with a mean PSNR of "
        f"{interval(best.interval, best.metric)}"
    )
    if best.gain is None or best.guess is None or not best.gain.n:
        return f"{sentence}. No baseline was scored on them, so it is open what a guess would get."
    return (
        f"{sentence}; guessing without looking at any update gets "
        f"{interval(best.guess, best.metric)}. {verdict(best.gain, best.metric)}"
    )


def rank(contest: Contest) -> str:
    """How the strongest was chosen, among how many, and what it was told."""
    best, n = contest.best.analysis, len(contest.lines)
    chosen = (
        "the only attack"
        if n == 1
        else f"the strongest of {n} attacks by its mean over {count(contest.clients, 'client')}"
    )
    if contest.beside_oracles:
        chosen += " without an oracle"
    if contest.partial:
        chosen += f", {len(contest.partial)} more scored too few of them to be compared"
    if best.told:
        chosen += ", told the defense"
    oracle = best.config.oracle
    return chosen + (f", ORACLE: told the true {' and '.join(oracle)}" if oracle else "")


def unmet(contest: Contest) -> str:
    """A sentence where a defense met no adversary that knows it."""
    if not contest.defense or contest.adaptive is not None:
        return ""
    return (
        " No attack on these clients knew the defense, so this says little about it: "
        "fl-privacy attack --adaptive runs those that do."
    )


def labels_too(best: Score | None) -> str:
    """A sentence more when the labels leaked, whatever the pictures did; else nothing."""
    if (
        best is None
        or best.gain is None
        or best.guess is None
        or "labels" in best.analysis.config.oracle
    ):
        return ""
    if not math.isfinite(best.gain.low) or best.gain.low <= 0:
        return ""
    return (
        f" The labels leaked: {100 * best.interval.mean:.0f} % of them were inferred, "
        f"a guess gets {100 * best.guess.mean:.0f} %."
    )


def verdict(gain: Interval, metric: MetricInfo) -> str:
    """What a paired difference to the baseline does and does not show."""
    size = interval(gain, metric, signed=True)
    if not math.isfinite(gain.low):
        alone = "target" if gain.n == 1 else "client"
        return f"One {alone} alone ({size} over the guess) shows no tendency."
    if gain.low > 0:
        return f"The updates leaked: {size} over the guess on the same {gain.n} targets."
    if gain.high < 0:
        return (
            f"By PSNR this attack did worse than the guess: {size} on the same {gain.n} targets. "
            f"That is no proof of privacy; another attack may do better."
        )
    return (
        f"By PSNR this attack did no better than the guess: {size} on the same {gain.n} targets. "
        f"That is no proof of privacy; another attack may do better."
    )


def knowledge(analysis: Analysis, run: Run) -> list[str]:
    """What an adversary saw and knew, in sentences; granted oracles are told apart."""
    model, training = analysis.config.threat_model, training_of(analysis, run)
    known = bool(model.get("local_training", False))
    given = bool(run.manifest.run_config.get("initial-model"))
    said = [unit(str(model.get("unit", "unknown")), run)]
    said += [batches(analysis.rows, training), rounds(analysis.rows, given=given)]
    if "labels" not in analysis.config.oracle:
        said.append("Labels were inferred, not given.")
    if known and training:
        how = local_training(training, batch_norm=run.batch_norm)
        said.append(f"It knew how clients train: {how}.")
    elif not known:
        said.append("It did not know learning rate, number of steps or batch size.")
    auxiliary = model.get("auxiliary")
    said.append(
        f"It held data of its own: the test split of {auxiliary}."
        if auxiliary
        else "It held no data of its own."
    )
    if own_node := model.get("own_node"):
        said.append(f"It was itself the client {own_node} and knew that client's updates.")
    adapts = "defense" in analysis.config.requires
    said.append(told_of(analysis.told, adapts, analysis.config.adaptation))
    withheld = model.get("withheld")
    if isinstance(withheld, list) and withheld:
        said.append(f"It did not see these parameters: {', '.join(map(str, withheld))}.")
    return [*said, budget(analysis)]


def training_of(analysis: Analysis, run: Run) -> LocalTraining | None:
    """How clients trained, as the threat model says it or else the manifest."""
    given = analysis.config.threat_model.get("training")
    return LocalTraining.model_validate(given) if given else run.manifest.local_training


def unit(name: str, run: Run) -> str:
    """What one target of the adversary was."""
    if name == "aggregate" and run.manifest.run_config.get("record-clients"):
        return RECORDED_ONLY
    return UNITS.get(name, f"Unit of attack: {name}.")


def told_of(defense: str, adapts: bool, adaptation: str = "") -> str:
    """Whether the adversary knew of a defense, and what it changed because of that."""
    said = f"It was told of the defense {defense}" if defense else "It was told of no defense"
    if adaptation:
        return f"{said}; it adapted to the clients' defense: {adaptation}"
    if not defense:
        return f"{said} and adapted to none."
    return f"{said} and adapted to it." if adapts else f"{said}; this attack does not use it."


def budget(analysis: Analysis) -> str:
    """How much the adversary was given to spend: all its settings that say something, and time."""
    seconds = sum(row["seconds"] or 0 for row in analysis.rows)
    given = {n: v for n, v in analysis.config.settings.items() if v not in (None, "")}
    chosen = ", ".join(f"{plain(name)} {setting(value)}" for name, value in given.items())
    return (
        f"Budget: {chosen or 'no settings'}; {seconds:,.1f} s on {analysis.config.device} for "
        f"{count(len(analysis.rows), 'target')}."
    )


def setting(value: object) -> str:
    """The value of a setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def local_training(training: LocalTraining, *, batch_norm: bool) -> str:
    """How a client turns data into an update; of batch norm only where the network has it."""
    decay = f", weight decay {training.weight_decay:g}" if training.weight_decay else ""
    momentum = f", momentum {training.momentum:g}" if training.momentum else ""
    work = (
        f"one SGD step on one batch of {count(training.batch_size, 'image')}"
        if training.algorithm == "fedsgd"
        else f"{count(training.epochs, 'local epoch')} of SGD in {training.order} batches of "
        f"{training.batch_size}"
    )
    norm = f", batch norm in {training.batch_norm} mode" if batch_norm else ""
    return f"{work}, learning rate {training.lr:g}{momentum}{decay}{norm}"


def batches(rows: Sequence[Mapping[str, Any]], training: LocalTraining | None) -> str:
    """How many images are behind each attacked update."""
    sizes = sorted(
        {
            row["images"] // len((row.get("rounds") or "1").split(","))
            for row in rows
            if row["images"]
        }
    )
    if not sizes:
        return "It is unknown how many images are behind each attacked update."
    span = count(sizes[0], "image") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} images"
    if training is not None and training.algorithm == "fedavg":
        return f"Each attacked target was computed from {span}, over several local steps."
    if sizes == [1]:
        return "The attacked batches hold one image each, the easiest case for an attack."
    return f"The attacked batches hold {span} each."


def rounds(rows: Sequence[Mapping[str, Any]], *, given: bool = False) -> str:
    """Which rounds were attacked, and whether the model was trained by then.

    ``given``: the run began with the parameters of an earlier one.
    """
    found = sorted({r for row in rows for r in rounds_of(row)})
    if not found:
        return "It is unknown which rounds were attacked."
    listed = ", ".join(map(str, found)) if len(found) < 9 else f"{found[0]} to {found[-1]}"
    noun = "round" if len(found) == 1 else "rounds"
    fresh = [row["attempt"] in (None, 1) and r == 1 for row in rows for r in rounds_of(row)]
    if given:
        trained = "the run began with the parameters of an earlier one (trained)"
    elif all(fresh):
        trained = "the model still had its initial weights (untrained)"
    elif any(fresh):
        trained = "the model had its initial weights in round 1 (untrained), later trained ones"
    else:
        trained = "the model had been trained by the earlier rounds"
    return f"Attacked: {noun} {listed}; {trained}."

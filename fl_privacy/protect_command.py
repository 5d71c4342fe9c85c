"""What ``fl-privacy protect`` does once its options are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Group
from rich.table import Table

from fl_privacy.analysis import Job, execute
from fl_privacy.attack_progress import attack_progress
from fl_privacy.code_digest import code_digest
from fl_privacy.custom_model import custom_model
from fl_privacy.layer_ranking import chosen, random_sets, ranking_of
from fl_privacy.layer_results import measurements
from fl_privacy.metrics.statistics import Interval
from fl_privacy.plan import recording_digest
from fl_privacy.printable import printable
from fl_privacy.protecting import attack_again, attacks_of, better
from fl_privacy.protection import Comparison, Measured, Protection, Spread, write_protection
from fl_privacy.recording import Recording
from fl_privacy.report import words
from fl_privacy.report.layer_aucs import layer_aucs
from fl_privacy.report.protection_words import cells, ranked, sets_in_words
from fl_privacy.report.scores import Analysis, analyses, defenses, score
from fl_privacy.results import ResultSet, load_results
from fl_privacy.run_folder import RunFolder
from fl_privacy.threat_model import ThreatModel
from fl_privacy.titled_table import titled_table
from fl_privacy.types import Task


@dataclass(frozen=True)
class Request:
    """What to protect: how many layers, ranked by what, compared with how many random choices.

    ``attack`` False: only name the layers and write the configuration.
    """

    budget: int
    by: str = ""
    repeats: int = 5
    seed: int = 0
    attack: bool = True


def protect(
    run: Path, request: Request, *, model: str = "", task: Task | None = None
) -> tuple[Protection, Path]:
    """Choose layers, write what withholds them, and attack again; the choice and its folder.

    Raises:
        ProtectionError: nothing ranks the layers, or there are too few for the budget.
        ThreatModelError, ComponentError, AnalysisError: an attack cannot be repeated.
    """
    found = analyses(load_results(run))
    ranking = ranking_of(request.by, measurements(run), layer_aucs(found))
    layers = chosen(ranking, request.budget)
    names = [layer for layer, _ in ranking.order]
    rivals = random_sets(names, request.budget, request.repeats, request.seed)
    attacks = attacks_of(found) if request.attack else []
    sets = [layers, *rivals]
    factory = custom_model(model) if model else None
    jobs = [[attack_again(run, a, s, model=factory, task=task) for s in sets] for a in attacks]
    protection = Protection(
        budget=request.budget,
        by=ranking.by,
        unit=ranking.unit,
        ranking=ranking.order,
        source=ranking.source,
        averaged=ranking.averaged,
        unranked=ranking.unranked,
        layers=layers,
        sets=rivals if attacks else (),
        every_set=bool(attacks) and len(rivals) + 1 == math.comb(len(names), request.budget),
        comparisons=tuple(
            line
            for before, own in zip(attacks, jobs, strict=True)
            for line in compared(before, [_executed(before, job) for job in own])
        ),
        seed=request.seed,
        recording_digest=recording_digest(Recording(RunFolder(run).recording)),
        code_digest=code_digest(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    known = ThreatModel.model_validate(attacks[0].config.threat_model) if attacks else ThreatModel()
    return protection, write_protection(run, protection, known)


def _executed(before: Analysis, job: Job) -> ResultSet:
    hidden = job.config.threat_model["withheld"]
    assert isinstance(hidden, list)
    with attack_progress(f"{before.label} without {', '.join(map(str, hidden))}") as progress:
        return execute(job, progress=progress)


def compared(before: Analysis, again: Sequence[ResultSet]) -> list[Comparison]:
    """Each score before, with the chosen layers withheld (the first), and with random ones.

    Defense by defense, as far as there was a score before.
    """
    after = [analyses([result])[0] for result in again]
    groups = defenses([before])
    lines = []
    for defense in groups:
        who = before.label + (f", {words.group_title(defense).lower()}" if len(groups) > 1 else "")
        reasons = [row["message"] for row in after[0].of(defense) if row["status"] == "failed"]
        for metric in after[0].config.metrics:
            nothing, first, *others = (
                score(one, defense, metric, None).interval for one in (before, *after)
            )
            own, *rest = (one.of(defense) for one in after)
            lines.append(
                Comparison(
                    adversary=who,
                    metric=metric,
                    nothing=as_measured(nothing),
                    chosen=as_measured(first),
                    random=spread([one.mean for one in others]),
                    better=as_measured(better(own, rest, metric)),
                    failed=reasons[0] if reasons and not first.n else "",
                )
            )
    return [line for line in lines if math.isfinite(line.nothing.mean)]


def as_measured(value: Interval) -> Measured:
    """An interval as it is written."""
    return Measured(mean=value.mean, low=value.low, high=value.high, n=value.n)


def spread(means: Sequence[float]) -> Spread:
    """The scores of several sets as they are written; of those that are numbers."""
    told = [mean for mean in means if math.isfinite(mean)] or [math.nan]
    count = sum(map(math.isfinite, told))
    return Spread(mean=fmean(told), lowest=min(told), highest=max(told), n=count)


def shown(found: Protection) -> Group:
    """The layers by rank, and what adversaries get, for the terminal."""
    ranks = Table(box=box.SIMPLE_HEAD, show_edge=False)
    ranks.add_column("layer", overflow="fold")
    ranks.add_column(printable(f"{found.by}\n{found.unit}"), justify="right", overflow="fold")
    ranks.add_column("")
    for layer, value in found.ranking:
        mark = "withhold" if layer in found.layers else ""
        ranks.add_row(printable(layer), f"{value:.3g}", mark)
    attacks = list(dict.fromkeys(line.adversary for line in found.comparisons))
    head = [f"Attacked again; random layers: {sets_in_words(found)}\n"] if attacks else []
    about = printable("".join(f"{line}\n" for line in ranked(found)))
    return Group(ranks, about, *head, *(_comparisons(found, attack) for attack in attacks))


def _comparisons(found: Protection, attack: str) -> Table:
    table = titled_table(words.plain(attack))
    table.add_column("mean, 95 % interval", overflow="fold")
    random = f"{found.budget} random, lowest to highest"
    for head in ("nothing withheld", "these withheld", random, "these hide more by"):
        table.add_column(head, justify="right", overflow="fold")
    for line in (one for one in found.comparisons if one.adversary == attack):
        table.add_row(*map(printable, (words.metric_name(line.metric.name), *cells(line))))
    return table

"""The first thing on the page: what the server could reconstruct, or why that is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl_privacy.report import words
from fl_privacy.report.reading import Run
from fl_privacy.report.scores import (
    Analysis,
    attacks,
    defenses,
    scores,
    strongest,
)

PSNR = "psnr"
"""The metric the headline is about."""

LABELS = "label_accuracy"
"""Told beside it, since labels leak where pictures do not."""


@dataclass(frozen=True)
class Headline:
    """One defense group in a sentence and two numbers."""

    title: str
    sentence: str
    got: str
    guess: str
    oracle: tuple[str, ...]


def headlines(found: Sequence[Analysis]) -> list[Headline]:
    """What the strongest attack got from each defense group that has a PSNR."""
    said = []
    for defense in defenses(found):
        lines = scores(found, defense)
        best = strongest(lines, PSNR)
        if best is None:
            continue
        said.append(
            Headline(
                title=words.group_title(defense),
                sentence=words.headline(best, attacks(lines, PSNR))
                + words.labels_too(strongest(lines, LABELS)),
                got=words.number(best.interval.mean, best.metric),
                guess=words.number(best.guess.mean, best.metric)
                if best.guess and best.guess.n
                else "",
                oracle=best.analysis.config.oracle,
            )
        )
    return said


def why_no_scores(run: Run) -> str:
    """Why there is no headline with numbers; empty when there is one."""
    tried = [a for a in run.analyses if not a.is_baseline]
    if not tried:
        return "No adversary has attacked this recording yet, so there is nothing to score."
    if all(row["status"] == "failed" for a in tried for row in a.rows):
        return "No attack produced anything to score: every target failed, for the reasons below."
    if run.truth_of is None:
        return (
            "The run kept no truth (it was no audit), so reconstructions cannot be compared to "
            "the clients' images and nothing is scored."
        )
    if not headlines(run.analyses):
        return "No reconstruction has a PSNR: the truth of these targets is missing."
    return ""


def weak_guesses(found: Sequence[Analysis]) -> list[str]:
    """A sentence when a baseline had no data to guess from, which flatters the attacks."""
    guesses = [a for a in found if a.is_baseline]
    constant = [
        a.label
        for a in guesses
        if not a.config.threat_model.get("auxiliary")
        and a.config.settings.get("guess") != "constant"
    ]
    return [
        f"{label} guessed a constant picture, because the run's data set is unknown or could not "
        f"be loaded where it ran: a mean picture would guess better, and gains would be smaller. "
        f'auxiliary = "DATASET" in the file of --threat-model names data to take it from.'
        for label in constant
    ]


def interrupted(found: Sequence[Analysis]) -> list[str]:
    """A sentence for each analysis that did not get to its end."""
    return [
        f"The analysis by {a.label} was interrupted after {words.count(len(a.rows), 'target')}; "
        f"the same command goes on where it stopped."
        for a in found
        if not a.config.complete
    ]

"""The first thing on the page: what the server could reconstruct, or why that is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl_privacy.report import words
from fl_privacy.report.contest import Contest, contests
from fl_privacy.report.reading import Run
from fl_privacy.report.scores import Analysis, Score, defenses

PSNR = "psnr"
"""The metric the headline is about."""

LABELS = "label_accuracy"
"""Told beside it, since labels leak where pictures do not."""


@dataclass(frozen=True)
class Side:
    """One number of a headline, who got it, and its style on the page."""

    got: str
    who: str
    kind: str
    unit: str = "dB"


@dataclass(frozen=True)
class Headline:
    """One contest in a sentence and a few numbers."""

    title: str
    sentence: str
    sides: tuple[Side, ...]
    oracle: tuple[str, ...]
    told: bool


def headlines(found: Sequence[Analysis]) -> list[Headline]:
    """What the strongest attack got in each contest that has a PSNR."""
    said = []
    for defense in defenses(found):
        held = contests(found, defense, PSNR)
        for one in held:
            told = [c for c in contests(found, defense, LABELS) if c.setting == one.setting]
            labels = told[0].best if told else None
            said.append(
                Headline(
                    title=words.contest_title(one, len(held)),
                    sentence=words.headline(one) + words.labels_too(labels) + words.unmet(one),
                    sides=(*sides(one), *labels_alone(one, labels)),
                    oracle=one.best.analysis.config.oracle,
                    told=bool(one.best.analysis.told),
                )
            )
    return said


def sides(one: Contest) -> tuple[Side, ...]:
    """The plain attack, the one that knows the defense, and the guess, as far as there are."""
    plain, adaptive, guess = one.plain, one.adaptive, one.best.guess
    shown = []
    if plain is not None:
        who = "plain attack" if adaptive else "server’s reconstruction"
        shown.append(Side(words.number(plain.interval.mean, plain.metric), who, "attack"))
    if adaptive is not None:
        got = words.number(adaptive.interval.mean, adaptive.metric)
        shown.append(Side(got, "adaptive attack", "attack"))
    if guess and guess.n:
        shown.append(Side(words.number(guess.mean, one.best.metric), "blind guess", "baseline"))
    return tuple(shown)


def labels_alone(one: Contest, labels: Score | None) -> tuple[Side, ...]:
    """The labels, where they leaked and the pictures did not."""
    gain = one.best.gain
    if labels is None or not labels.guess or not words.labels_too(labels):
        return ()
    if gain is not None and gain.low > 0:
        return ()
    who = f"labels (guess {100 * labels.guess.mean:.0f} %)"
    return (Side(f"{100 * labels.interval.mean:.0f}", who, "attack", "%"),)


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
        if any(
            row.get(m.name) is not None for a in tried for row in a.rows for m in a.config.metrics
        ):
            return "No attack reconstructed inputs: what it inferred is scored in the table below."
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

"""What is said of single exchanges, and the results that they make up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adversaries.property_snapshot import WHOLE
from adversaries.targets import Unattackable, members_of, training_of
from fl_privacy.types import Exchange, Failure, Observation, Outcome, PropertyScores

Place = tuple[int, int]
"""Number of a target and of one of its exchanges."""


@dataclass(frozen=True)
class Answer:
    """Layer, or `WHOLE` -> probability of the property; or the reason why there is none."""

    scores: Mapping[str, float]
    reason: str
    seconds: float = 0.0


Answers = dict[int, Answer]
"""What is said of the exchanges of one target, by their number."""


def judged_together(
    observations: Sequence[Observation],
    answers: Sequence[Answers],
    too_early: Callable[[Exchange], bool],
) -> list[list[Place]]:
    """Exchanges that the same classifiers score; why others are not goes to ``answers``.

    Those of clients of equal sizes follow each other, as what is simulated for one round helps the
    next one only then.
    """
    found: dict[tuple[int, ...], dict[object, list[Place]]] = {}
    for i, observation in enumerate(observations):
        for j, exchange in enumerate(observation.exchanges):
            try:
                if too_early(exchange):
                    raise Unattackable(f"round {exchange.round} lies within the warm-up")
                counts = members_of(exchange, training_of(observation))
            except Unattackable as error:
                answers[i][j] = Answer({}, str(error))
                continue
            where = exchange.attempt, exchange.round, exchange.global_digest
            alike = (*where, observation.withheld, id(observation.auxiliary))
            found.setdefault(counts, {}).setdefault(alike, []).append((i, j))
    return [places for own in found.values() for places in own.values()]


def complete(observation: Observation, answers: Answers) -> bool:
    """Whether there is an answer for every exchange of a target."""
    return len(answers) == len(observation.exchanges)


def result_of(observation: Observation, name: str, answers: Answers) -> PropertyScores | Failure:
    """The scores of a target's exchanges for the property ``name``; a failure without any."""
    told = [answers[j] for j in range(len(observation.exchanges))]
    reasons = [answer.reason for answer in told if answer.reason]
    if len(reasons) == len(told):
        return Failure(observation.key, reasons[0])
    parts = next(tuple(answer.scores) for answer in told if answer.scores)
    by_layer = {
        part: torch.tensor(
            [answer.scores.get(part, math.nan) for answer in told], dtype=torch.float64
        )
        for part in parts
    }
    outcome = Outcome("completed")
    if reasons:
        said = f"{len(reasons)} of {len(told)} rounds are not scored: {reasons[0]}"
        outcome = Outcome("partial", said)
    return PropertyScores(
        key=observation.key,
        scores=by_layer.pop(WHOLE),
        outcome=outcome,
        seconds=sum(answer.seconds for answer in told),
        property=name,
        by_layer=by_layer,
    )

"""What dense layers see of any input: the guess that representation inference has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fl_privacy.component import Component
from fl_privacy.dense_layers import seen_when_sent
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import Failure, Observation, Outcome, Representations


class RepresentationGuess(Component):
    """Answer with the mean representation of auxiliary inputs under the network that was sent.

    The update is never read. ``of="all"`` gives every class the mean over all auxiliary
    inputs; ``of="class"`` the mean over its own, which is all that can be had from data of
    that class alone. Every class of the auxiliary data is answered with, so that the
    precision is what guessing gives.
    """

    of: Annotated[
        Literal["all", "class"], Field(description="inputs whose mean a class is answered with")
    ] = "all"

    requires: ClassVar[frozenset[str]] = frozenset({"auxiliary"})

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Representations | Failure]:
        """Guess for each target; nothing is random, and ``device`` is not used."""
        known: tuple[str, Representations | Failure] | None = None
        for i, observation in enumerate(observations, start=1):
            sent = observation.exchanges[-1].global_digest
            if known is None or known[0] != sent:
                known = sent, self.guess(observation)
            yield copied(known[1], observation.key)
            progress(i, len(observations))

    def guess(self, observation: Observation) -> Representations | Failure:
        """The answer for every target that was sent the same network."""
        auxiliary = observation.auxiliary
        assert auxiliary is not None, "checked against `requires` before any work"
        seen = seen_when_sent(observation, auxiliary.inputs)
        if not seen:
            return Failure(
                observation.key,
                "the network ends in no dense layer: expected one with a row a class",
            )
        labels = auxiliary.labels
        classes = torch.bincount(labels).nonzero().flatten()
        answer = {
            name: value.mean(0).expand(len(classes), -1)
            if self.of == "all"
            else torch.stack([value[labels == c].mean(0) for c in classes])
            for name, value in seen.items()
        }
        return Representations(observation.key, classes, answer, Outcome("completed", "guessed"), 0)


def copied(answer: Representations | Failure, key: str) -> Representations | Failure:
    """The same answer for another target."""
    if isinstance(answer, Failure):
        return Failure(key, answer.reason)
    return Representations(key, answer.classes, answer.layers, answer.outcome, answer.seconds)

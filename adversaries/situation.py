"""What of the targets decides how an adversary can adapt to their defense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from adversaries.local_steps import skeleton
from adversaries.targets import Unattackable, check_linked
from adversaries.tracing import probe
from fl_privacy.dense_layers import linear_inputs
from fl_privacy.types import LocalTraining, Observation, Task

TOGETHER = 8
"""Linked rounds that cost no more than can be waited for."""


@dataclass(frozen=True)
class Situation:
    """The network, how clients train, and what was recorded of them.

    ``images`` is the largest number of images behind a target, ``rounds`` are those attacked,
    ``unlinkable`` says why one client's rounds cannot be attacked together, if they cannot.
    """

    network: nn.Module
    task: Task
    training: LocalTraining | None
    images: int
    rounds: tuple[int, ...]
    unlinkable: str = ""

    @property
    def steps(self) -> int:
        """Local steps behind an update; one where the training is unknown."""
        return self.training.steps(self.images) if self.training else 1

    @cached_property
    def dense(self) -> dict[str, int]:
        """Each dense layer that sees one vector an image, and how long it is."""
        with torch.no_grad():
            seen = linear_inputs(self.network, {}, probe(self.task))
        return {name: vectors.shape[1] for name, vectors in seen.items()}


def situation(targets: Sequence[Observation], linked: Sequence[Observation]) -> Situation:
    """Look at the ``targets``, and at the same clients' rounds ``linked`` into one target each."""
    first = targets[0]
    training = first.local_training
    return Situation(
        network=skeleton(first.model(), training or LocalTraining()),
        task=first.task,
        training=training,
        images=max(e.num_examples or 1 for o in targets for e in o.exchanges),
        rounds=tuple(sorted({e.round for o in targets for e in o.exchanges})),
        unlinkable=unlinkable(linked, training),
    )


def unlinkable(linked: Sequence[Observation], training: LocalTraining | None) -> str:
    """Why no client's rounds can be attacked together; empty when some can."""
    several = [o for o in linked if len(o.exchanges) > 1]
    if not several:
        return "no client was recorded in more than one round"
    longest = max(len(o.exchanges) for o in several)
    if longest > TOGETHER:
        return (
            f"a client was recorded in {longest} rounds, each of which is simulated in every "
            f"iteration: choose {TOGETHER} or fewer with --rounds"
        )
    if training is None:
        return "the local training is unknown, so it is open whether rounds hold the same images"
    for observation in several:
        try:
            check_linked(observation, training)
        except Unattackable as error:
            why = str(error)
        else:
            return ""
    return why

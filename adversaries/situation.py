"""What of the targets decides how an adversary can adapt to their defense."""

from __future__ import annotations

import math
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

    ``images`` is the largest number of images behind a target, ``own`` that of one client
    behind it; ``averaged`` is what averaging in an aggregate leaves of the deviation of its
    clients' noise. ``rounds`` are those attacked, ``unlinkable`` says why one client's rounds
    cannot be attacked together, if they cannot.
    """

    network: nn.Module
    task: Task
    training: LocalTraining | None
    images: int
    own: int
    rounds: tuple[int, ...]
    averaged: float = 1.0
    unlinkable: str = ""

    @property
    def steps(self) -> int:
        """Local steps of a client; one where the training is unknown."""
        return self.training.steps(self.own) if self.training else 1

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
    exchanges = [e for o in targets for e in o.exchanges]
    members = first.exchanges[0].members
    return Situation(
        network=skeleton(first.model(), training or LocalTraining()),
        task=first.task,
        training=training,
        images=max(e.num_examples or 1 for e in exchanges),
        own=max(n for e in exchanges for n in e.members or (e.num_examples or 1,)),
        rounds=tuple(sorted({e.round for e in exchanges})),
        averaged=math.hypot(*members) / sum(members) if any(members) else 1.0,
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

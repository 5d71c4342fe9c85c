"""Retrieval: answer with the known image whose gradient looks most like the observed one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.func import vmap

from adversaries.local_steps import Client
from adversaries.matching import Chunk, attack_chunks, make_batch
from adversaries.targets import Target, Unattackable, prepare
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.seeding import generator
from fl_privacy.types import (
    Failure,
    Observation,
    Outcome,
    PositiveInt,
    Reconstruction,
    Samples,
    Tensors,
)

HELD = 2**26
"""Numbers of observed gradients that are held at once: 256 MiB in float32."""

Ranking = tuple[Tensor, Tensor]
"""Auxiliary samples of one label ``[c]``, best first, and their cosines ``[c]``."""


class NearestImage(Component):
    """Answer with the auxiliary image of each label whose gradient is nearest to the observed.

    For each label (inferred unless granted) at most ``candidates`` auxiliary samples are
    drawn from the seed. Their one-step gradients are computed once for every global model;
    the answer is the one with the largest cosine to the observed gradient (of linked rounds,
    with the largest mean cosine). Images of a batch are sought independently, each alone
    against the gradient of all of them, and no candidate is taken twice. The update of
    several local steps, or of an aggregate, is taken for a gradient as it is.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"auxiliary", "local_training"})

    candidates: Annotated[PositiveInt, Field(description="images tried for each label")] = 100
    together: Annotated[PositiveInt, Field(description="gradients computed at once")] = 25

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Reconstruction | Failure]:
        """Find an image for each image of each target; progress counts targets."""
        if not observations:
            return
        weights = sum(p.numel() for p in observations[0].model().parameters())
        at_once = max(1, HELD // (weights * len(observations[0].exchanges)))

        def solve(chunk: Chunk) -> list[Reconstruction | Failure]:
            start = time.perf_counter()
            answers = self.solve(chunk, seed=seed, device=device)
            share = (time.perf_counter() - start) / len(answers)
            progress(chunk.done + len(answers), len(observations))
            return [
                replace(a, seconds=share) if isinstance(a, Reconstruction) else a for a in answers
            ]

        yield from attack_chunks(observations, at_once, solve, partial(prepare, unrolled=False))

    def solve(
        self, chunk: Chunk, *, seed: int, device: torch.device
    ) -> list[Reconstruction | Failure]:
        """An answer for each target of a chunk, all of which were sent the same parameters.

        Raises:
            Unattackable: the gradient of a single image cannot be computed.
        """
        auxiliary = chunk.observation.auxiliary
        assert auxiliary is not None, "checked against `requires` before any work"
        client = single_image(chunk, device)
        names = tuple(chunk.targets[0].observed[0])
        seen = [[direction(one).to(device) for one in t.observed] for t in chunk.targets]
        labels = [set(target.labels.tolist()) for target in chunk.targets]
        rankings: list[dict[int, Ranking]] = [{} for _ in chunk.targets]
        for label in sorted(set().union(*labels)):
            drawn = draw(auxiliary.labels, label, self.candidates, seed)
            inputs = chunk.observation.task.normalize(auxiliary.inputs[drawn].to(device))
            holders = [i for i, held in enumerate(labels) if label in held]
            parts = [
                cosines(gradients(client, part, label, names), [seen[i] for i in holders])
                for part in torch.split(inputs, self.together)
                if len(part)
            ]
            found = torch.cat([torch.zeros(0, len(holders)), *parts])
            for i, scores in zip(holders, found.T, strict=True):
                best = scores.argsort(descending=True, stable=True)
                rankings[i][label] = drawn[best], scores[best]
        return [
            answer(target, ranking, auxiliary)
            for target, ranking in zip(chunk.targets, rankings, strict=True)
        ]


def single_image(chunk: Chunk, device: torch.device) -> Client:
    """A client that takes one step on one image from the parameters the chunk was sent."""
    one = replace(chunk, targets=chunk.targets[:1])
    client = make_batch(one, restarts=1, lanes=1, device=device, unrolled=False).client
    return replace(client, members=(1,))


def direction(tensors: Tensors) -> Tensor:
    """All tensors in one row of norm 1, ``[parameters]`` float32; each target on its own."""
    row = torch.cat([t.flatten() for t in tensors.values()])
    unit: Tensor = row / row.norm()
    return unit.float()


def draw(labels: Tensor, label: int, count: int, seed: int) -> Tensor:
    """At most ``count`` indices of samples of a label, drawn without replacement."""
    of_label = (labels == label).nonzero().flatten()
    order = torch.randperm(len(of_label), generator=generator(seed, "candidates", label))
    return of_label[order[:count]]


def gradients(client: Client, inputs: Tensor, label: int, names: Sequence[str]) -> list[Tensor]:
    """The one-step gradient of each input alone, for each linked round: ``[c, parameters]``.

    Raises:
        Unattackable: it cannot be computed.
    """
    one = torch.tensor([label], device=inputs.device)
    try:
        rounds = vmap(lambda x: client.simulate(x[None], one))(inputs)
    except (RuntimeError, ValueError) as error:
        first, _, _ = str(error).partition("\n")
        raise Unattackable(
            f"the gradient of one image alone cannot be computed: {first}; "
            f"expected a network that torch.func.vmap takes (batch norm may need "
            f"batch_norm='eval'), or a smaller `together` if memory ran out"
        ) from None
    return [torch.cat([its[n].reshape(len(inputs), -1) for n in names], 1) for its in rounds]


def cosines(rounds: Sequence[Tensor], seen: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean cosine over rounds of each candidate with each target, ``[c, targets]``, on the CPU.

    ``rounds`` are gradients ``[c, parameters]``, ``seen`` the `direction` of each target in
    each round. Target by target, so that its bits do not depend on its mates.
    """
    units = [torch.nn.functional.normalize(rows, dim=1) for rows in rounds]
    columns = [
        torch.stack([rows @ row for rows, row in zip(units, its, strict=True)]).mean(0)
        for its in seen
    ]
    return torch.stack(columns, 1).cpu()


def answer(
    target: Target, rankings: dict[int, Ranking], auxiliary: Samples
) -> Reconstruction | Failure:
    """The best candidates of each label, as many as the target holds images of it."""
    chosen = torch.zeros(len(target.labels), dtype=torch.int64)
    scores = torch.zeros(len(target.labels))
    for label, (ranked, similar) in rankings.items():
        places = (target.labels == label).nonzero().flatten()
        if len(places) > len(ranked):
            return Failure(
                target.key,
                f"{len(places)} different images of class {label} are wanted and "
                f"{len(ranked)} candidates are there: expected more auxiliary samples of that "
                f"class, or more `candidates`",
            )
        chosen[places], scores[places] = ranked[: len(places)], similar[: len(places)]
    return Reconstruction(
        key=target.key,
        inputs=auxiliary.inputs[chosen],
        labels=target.labels,
        outcome=Outcome("completed"),
        loss=float(1 - scores.mean()),
    )

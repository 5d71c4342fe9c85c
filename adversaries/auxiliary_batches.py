"""Auxiliary batches with and without a property, and the updates that clients would make of them.

Melis et al.: Exploiting Unintended Feature Leakage in Collaborative Learning, S&P 2019,
section 4, https://arxiv.org/abs/1805.04049.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.func import vmap

from adversaries.dealt_property import dealt_anew
from adversaries.gradient_features import features
from adversaries.local_steps import Client
from fl_privacy.datasets.properties import HAS, LACKS, PropertyError, secret_property
from fl_privacy.seeding import derive_seed
from fl_privacy.types import Samples, Task, Tensors

DEALS = 20
"""Ways to deal out a property that means nothing, of which one is taken."""


@dataclass(frozen=True)
class Pool:
    """The auxiliary samples of known property: which have it and which do not, ``[n]`` each."""

    property: str
    positives: Tensor
    negatives: Tensor


def pool_of(auxiliary: Samples, name: str) -> Pool:
    """The samples that have a property (1) and that have not (0); an empty name is the only one.

    Raises:
        PropertyError: no such property, several without a name, one of a single value, or one
            that the labels give away.
    """
    name, values, _ = secret_property(auxiliary, name, "the auxiliary data")
    return split(name, values)


def meaningless_pool(auxiliary: Samples, name: str, seed: int) -> Pool:
    """The pool of a property that means nothing, dealt out among people (`dealt_anew`).

    Of `DEALS` ways that after which about as many samples have it as before.

    Raises:
        PropertyError: as `pool_of`.
    """
    name, values, _ = secret_property(auxiliary, name, "the auxiliary data")
    having = int((values == HAS).sum())
    deals = [
        dealt_anew(values, auxiliary.people, derive_seed(seed, "meaningless property", number))
        for number in range(DEALS)
    ]
    return split(name, min(deals, key=lambda dealt: abs(int((dealt == HAS).sum()) - having)))


def split(name: str, values: Tensor) -> Pool:
    """The pool of a property with these values ``[n]``."""
    return Pool(name, *(torch.nonzero(values == kind).flatten() for kind in (HAS, LACKS)))


def check_pool(pool: Pool, images: int, share: float) -> None:
    """Check that batches of ``images``, with at most this ``share`` of positives, can be drawn.

    Raises:
        PropertyError: too few samples of one kind.
    """
    needed = {
        "have": (pool.positives, with_property(images, share)),
        "lack": (pool.negatives, images),
    }
    for verb, (held, wanted) in needed.items():
        if len(held) < wanted:
            raise PropertyError(
                f"{len(held)} auxiliary samples {verb} {pool.property!r} and a batch takes "
                f"{wanted} such without repeating any: expected more auxiliary data, or "
                f"batch_size={len(held)}"
            )


def with_property(images: int, share: float) -> int:
    """How many images of a batch that counts as having the property have it; one at least."""
    return max(1, round(share * images))


def draw_batches(
    pool: Pool,
    counts: Sequence[int],
    shares: Sequence[float],
    batches: int,
    generator: Generator,
    *,
    first: int = 0,
) -> Tensor:
    """Positions ``[batches, images]`` of the samples of simulated clients.

    Every other batch, from the first (`has_property`), has the property: a share of one of the
    clients (of ``counts`` images each, side by side), in random places. All other images have
    not. No batch of a client holds a sample twice. ``shares`` come in turn, from that of number
    ``first`` on, so that an even number of batches and then others are the same as all at once.
    """

    def draw(held: Tensor, n: int) -> Tensor:
        return held[torch.randperm(len(held), generator=generator)[:n]]

    def client(images: int, positives: int) -> Tensor:
        mixed = torch.cat(
            [draw(pool.positives, positives), draw(pool.negatives, images - positives)]
        )
        return mixed[torch.randperm(images, generator=generator)]

    rows = []
    for i, has in enumerate(has_property(batches).tolist()):
        victim = int(torch.randint(len(counts), (), generator=generator))
        share = shares[(first + i // 2) % len(shares)]
        held = [
            client(n, with_property(n, share) if has and place == victim else 0)
            for place, n in enumerate(counts)
        ]
        rows.append(torch.cat(held))
    return torch.stack(rows)


def has_property(batches: int) -> Tensor:
    """Which of ``batches`` drawn ones have the property, ``[batches]`` bool."""
    return torch.arange(batches) % 2 == 0


def simulated_features(
    client: Client, task: Task, samples: Samples, batches: Tensor, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Layer -> features ``[batches, features]`` of the updates that ``client`` makes of samples.

    ``batches [batches, images]`` are positions in ``samples``; all are simulated at once, and
    each takes about the memory of a client's training.
    """
    device = next(iter(client.sent[0].parameters.values())).device

    def update(inputs: Tensor, labels: Tensor) -> Tensors:
        return client.simulate(inputs, labels)[0]

    inputs = task.normalize(samples.inputs[batches].to(device))
    found = features(vmap(update)(inputs, samples.labels[batches].to(device)), layers)
    return {layer: rows.cpu() for layer, rows in found.items()}

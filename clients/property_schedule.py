"""Which clients hold samples that have a property, and in which rounds they train on them.

Melis, Song, De Cristofaro, Shmatikov: Exploiting Unintended Feature Leakage in Collaborative
Learning, S&P 2019, https://arxiv.org/abs/1805.04049, and the code that its authors published.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from fl_privacy.component import ComponentError
from fl_privacy.datasets.properties import HAS, LACKS, PropertyError, property_of
from fl_privacy.settings import RunSettings
from fl_privacy.types import Samples


def scheduled(
    own: Tensor,
    samples: Samples,
    settings: RunSettings,
    client: int,
    round: int,
    generator: Generator,
) -> tuple[Tensor, Samples]:
    """Those of a client's samples that it trains on in ``round``, and their indices ``own [n]``.

    The first ``client-victims`` partitions are victims. Under ``every:K`` they train in rounds
    1, K + 1, 2K + 1, ... on samples with the property, in all others on samples without it: on
    as many as the rarer kind has, drawn anew each round (the first ones under sequential
    order), so that neither the number of examples nor that of steps tells the kind of a round.
    Under ``mixed`` victims train on all that they have. All other clients train on samples
    without the property, as in the authors' code, where only victim and adversary have it. A
    sample whose property is unknown is of neither kind.

    Without a ``client-property-schedule`` everything comes back as it is.

    Raises:
        ComponentError: the dataset has no such property, or the client has less than a batch of
            what its schedule needs.
    """
    if not settings.client_property_schedule:
        return own, samples
    if client < settings.client_victims:
        chosen = victim_positions(samples, settings, round=round, generator=generator)
    else:
        chosen = of_kind(samples, settings.client_property, LACKS, least=settings.batch_size)
    return own[chosen], samples.take(chosen)


def victim_positions(
    samples: Samples, settings: RunSettings, *, round: int, generator: Generator
) -> Tensor:
    """Ascending positions, among its ``samples``, of what a victim trains on.

    Raises:
        ComponentError: too few with the property, or without it where some rounds need these.
    """
    every, name = period(settings.client_property_schedule), settings.client_property
    if every is None:
        of_kind(samples, name, HAS, least=1)
        return torch.arange(len(samples))
    have = of_kind(samples, name, HAS, least=settings.batch_size)
    if every == 1:
        return have
    lack = of_kind(samples, name, LACKS, least=settings.batch_size)
    count, kind = min(len(have), len(lack)), have if (round - 1) % every == 0 else lack
    if settings.order == "sequential":
        return kind[:count]
    return kind[torch.randperm(len(kind), generator=generator)[:count]].sort().values


def of_kind(samples: Samples, name: str, kind: int, *, least: int) -> Tensor:
    """Positions of the samples whose property ``name`` is ``kind``.

    Raises:
        ComponentError: no such property, or fewer samples than ``least``.
    """
    found = torch.nonzero(values_of(samples, name) == kind).flatten()
    if len(found) < least:
        smaller = "a smaller batch-size, " if least > 1 else ""
        raise ComponentError(
            f"expected {least} or more samples {'with' if kind == HAS else 'without'} the property "
            f"{name!r}, got {len(found)} of {len(samples)}; use {smaller}fewer clients or another "
            f"partition"
        )
    return found


def period(schedule: str) -> int | None:
    """K of ``every:K``; None for another schedule."""
    every, _, rounds = schedule.partition(":")
    return int(rounds) if every == "every" else None


def values_of(samples: Samples, name: str) -> Tensor:
    """The values of a property, ``[n]``.

    Raises:
        ComponentError: there is none of that name; the message lists those that exist.
    """
    try:
        return property_of(samples.properties, name, "the dataset").values
    except PropertyError as error:
        raise ComponentError(f"client-property: {error}") from None


def refuse_schedule(samples: Samples, settings: RunSettings, client: int) -> None:
    """Before a simulation: refuse what `scheduled` would refuse in any round.

    Raises:
        ComponentError: as there.
    """
    own, unused = torch.arange(len(samples)), torch.Generator()
    for round in (1, 2):
        scheduled(own, samples, settings, client, round, unused)

"""A property that means nothing, for comparison: dealt out anew, as one of people that it is.

Samples of one person are alike whatever they have, and a property such as gender goes with the
person. Shuffled among samples it would mean less than nothing: no batch would be of other people
than the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.datasets.properties import HAS, LACKS
from fl_privacy.seeding import generator

ALIKE = 20
"""People, at least, among whom a property is dealt out; where fewer are known, all of them."""


def dealt_anew(values: Tensor, people: Tensor | None, seed: int) -> Tensor:
    """A property ``[n]`` that means nothing, and is as much one of people as that of ``values``.

    Each person gets the share of samples with the property that another has, of those with about
    as many samples (`alike`); on which of its samples is drawn. Where all of a person's samples
    have one value, or people have equally many samples, this deals people's own values out
    among people. Where ``people`` are unknown each sample is taken to be of another, so
    the samples' values are shuffled. Unknown ones stay so.
    """
    known = torch.nonzero(values >= 0).flatten()
    whose = torch.arange(len(known)) if people is None else people[known]
    who, counts = torch.unique(whose, return_inverse=True, return_counts=True)[1:]
    draw = generator(seed, "property dealt anew")
    shares = torch.bincount(who, (values[known] == HAS).double()) / counts
    for group in alike(counts):
        shares[group] = shares[group[torch.randperm(len(group), generator=draw)]]
    chance = torch.rand(len(counts), generator=draw, dtype=torch.float64)
    having = (shares * counts + chance).floor()
    order = torch.randperm(len(known), generator=draw)
    order = order[who[order].argsort(stable=True)]  # people together, the samples of each in turn
    place = torch.arange(len(known)) - (counts.cumsum(0) - counts)[who[order]]
    dealt = values.clone()
    dealt[known[order]] = torch.where(place < having[who[order]], HAS, LACKS)
    return dealt


def alike(counts: Tensor) -> list[Tensor]:
    """Groups of `ALIKE` people or more with about equal ``counts [people]`` of samples.

    All with the same count are in one group; the largest counts join the last.
    """
    groups: list[Tensor] = []
    rest = torch.empty(0, dtype=torch.int64)
    for count in torch.unique(counts):
        rest = torch.cat([rest, torch.nonzero(counts == count).flatten()])
        if len(rest) >= ALIKE:
            groups.append(rest)
            rest = rest[:0]
    return [*groups[:-1], torch.cat([*groups[-1:], rest])]

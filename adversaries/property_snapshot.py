"""Global models, what clients would answer to them, and the classifiers that learn from that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from adversaries.auxiliary_batches import (
    Pool,
    draw_batches,
    has_property,
    meaningless_pool,
    pool_of,
    simulated_features,
)
from adversaries.gradient_features import Classifier, features, joined
from adversaries.local_steps import Client, Sent, buffers_left
from adversaries.targets import Unattackable, gradient_units
from fl_privacy.datasets.properties import PropertyError
from fl_privacy.layers import weight_layers, weight_of
from fl_privacy.seeding import generator
from fl_privacy.types import (
    Exchange,
    GlobalModel,
    LocalTraining,
    Observation,
    Samples,
    Task,
)

WHOLE = ""
"""Name of the whole update among the layers: that of a network which is nothing but a layer."""


@dataclass(frozen=True)
class Clients:
    """The clients behind an exchange as the adversary simulates them, with its own data.

    ``counts`` are their numbers of images, ``model`` is the `skeleton` of the network.
    """

    model: nn.Module
    training: LocalTraining
    counts: tuple[int, ...]
    task: Task
    samples: Samples
    pool: Pool
    shares: tuple[float, ...]
    layers: tuple[str, ...]
    device: torch.device

    def sent(self, model: GlobalModel) -> Client:
        """Those clients when they were sent a global model."""
        network = self.model.to(self.device)
        sent = Sent(
            {n: t.float().to(self.device) for n, t in model.parameters.items()},
            {n: t.to(self.device) for n, t in buffers_left(network, model.buffers).items()},
        )
        return Client(network, self.training, self.counts, (sent,))


@dataclass
class Simulated:
    """Features of updates simulated at one global model, as many as were asked for so far.

    Batches are drawn and simulated in blocks of ``together``, in order, so that the first n are
    the same, to the bit, however many follow; which are drawn does not depend on ``together``.
    """

    clients: Clients
    model: GlobalModel
    generator: Generator
    together: int
    blocks: list[Mapping[str, Tensor]] = field(default_factory=list)

    @cached_property
    def first(self) -> int:
        """The share that the first batch with the property has; drawn before all batches."""
        return int(torch.randint(len(self.clients.shares), (), generator=self.generator))

    def rows(self, batches: int) -> dict[str, Tensor]:
        """Layer -> features ``[batches, features]``; every other row has the property.

        Raises:
            Unattackable: they are not finite.
        """
        while len(self.blocks) * self.together < batches:
            self.blocks.append(self._block())
        return {
            layer: torch.cat([block[layer] for block in self.blocks])[:batches]
            for layer in self.clients.layers
        }

    def _block(self) -> Mapping[str, Tensor]:
        who = self.clients
        first = self.first + len(self.blocks) * self.together // 2
        drawn = draw_batches(
            who.pool, who.counts, who.shares, self.together, self.generator, first=first
        )
        client = who.sent(self.model)
        found = simulated_features(client, who.task, who.samples, drawn, who.layers)
        if not all(rows.isfinite().all() for rows in found.values()):
            raise Unattackable(
                "updates simulated at this global model are not finite: expected a model whose "
                "training has not diverged"
            )
        return found


@dataclass
class Memory:
    """What was simulated at the global models that were asked for last, ``most`` of them.

    And the pools that batches are drawn from: by a property that means nothing if ``permuted``,
    one for all rounds.
    """

    seed: int
    together: int
    most: int
    permuted: bool = False
    kept: OrderedDict[object, Simulated] = field(default_factory=OrderedDict)
    pools: dict[object, Pool] = field(default_factory=dict)

    def pool(self, auxiliary: Samples, name: str) -> Pool:
        """Which samples have a property, or count as having it.

        Raises:
            PropertyError: it cannot be inferred with these samples.
        """
        key = id(auxiliary), name
        if key not in self.pools:
            self.pools[key] = (
                meaningless_pool(auxiliary, name, self.seed)
                if self.permuted
                else pool_of(auxiliary, name)
            )
        return self.pools[key]

    def at(self, model: GlobalModel, clients: Clients) -> Simulated:
        """Updates of ``clients`` simulated at ``model``, known or to be made."""
        where: tuple[int | str, ...] = (model.digest, *clients.counts)
        key = (*where, clients.layers, id(clients.samples))
        if key not in self.kept:
            draws = generator(self.seed, *where, "auxiliary batches")
            self.kept[key] = Simulated(clients, model, draws, self.together)
        self.kept.move_to_end(key)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return self.kept[key]


@dataclass(frozen=True)
class Fitted:
    """The classifiers of one exchange's window of global models, by layer or `WHOLE`."""

    classifiers: Mapping[str, Classifier]
    layers: tuple[str, ...]
    training: LocalTraining
    one_step: bool

    def scores(self, exchange: Exchange) -> dict[str, float]:
        """Probability that the batch behind ``exchange`` has the property.

        Raises:
            Unattackable: the update holds values that are not finite.
        """
        seen = gradient_units(exchange, self.training, merged=1 if self.one_step else 0)
        found = features({n: g.unsqueeze(0) for n, g in seen.items()}, self.layers)
        return {
            name: float(fitted.predict_proba(rows_of(found, self.layers, name).numpy())[0, 1])
            for name, fitted in self.classifiers.items()
        }


def rows_of(found: Mapping[str, Tensor], layers: Sequence[str], name: str) -> Tensor:
    """The features ``[n, features]`` of one layer, or of the `WHOLE` update."""
    return joined(found, layers if name == WHOLE else (name,))


def training_rows(studied: Sequence[Simulated], batches: int) -> tuple[dict[str, Tensor], Tensor]:
    """At least ``batches`` simulated updates, evenly from each global model, and who has it.

    Layer -> features ``[n, features]``; ``[n]`` bool.
    """
    each = 2 * -(-batches // (2 * len(studied)))
    parts = [one.rows(each) for one in studied]
    found = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
    return found, has_property(each).repeat(len(studied))


def visible_layers(observation: Observation, model: nn.Module) -> tuple[str, ...]:
    """The `weight_layers` whose weights are not withheld.

    Raises:
        PropertyError: there is none.
    """
    every = weight_layers(model, observation.task)
    seen = tuple(layer for layer in every if weight_of(layer) not in observation.withheld)
    if not seen:
        raise PropertyError(
            f"the update shows the weight of no layer, of {', '.join(every) or 'none there are'}: "
            f"expected a threat model that leaves one"
        )
    return seen


def window_of(
    observation: Observation, exchange: Exchange, first: int, most: int
) -> list[GlobalModel]:
    """The global models that an exchange is judged by: its own and those sent before it.

    The ``most`` last ones, oldest first, each once, of rounds from ``first`` on; its own is
    there also where the recording's history is not known.
    """
    now = exchange.attempt, exchange.round
    found = {
        model.digest: model
        for model in observation.history
        if (model.attempt, model.round) <= now and (model.attempt > 1 or model.round >= first)
    }
    sent = exchange.parameters, exchange.buffers
    own = found.pop(exchange.global_digest, GlobalModel(*now, exchange.global_digest, *sent))
    return [*found.values(), own][-most:]

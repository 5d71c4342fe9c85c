"""Does a client's batch hold a property that has nothing to do with the task? The passive PIA.

Melis et al.: Exploiting Unintended Feature Leakage in Collaborative Learning, S&P 2019,
section 4, https://arxiv.org/abs/1805.04049.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from adversaries.auxiliary_batches import check_pool, pool_of
from adversaries.gradient_features import Family, classifier
from adversaries.local_steps import skeleton
from adversaries.property_answers import (
    Answer,
    Answers,
    Place,
    complete,
    judged_together,
    result_of,
)
from adversaries.property_snapshot import (
    WHOLE,
    Clients,
    Fitted,
    Memory,
    rows_of,
    training_rows,
    visible_layers,
    window_of,
)
from adversaries.targets import Unattackable, members_of, training_of
from adversaries.tokens import refuse_tokens
from fl_privacy.component import Component
from fl_privacy.datasets.properties import PropertyError
from fl_privacy.protocols import Progress, silent
from fl_privacy.recording import RecordingError
from fl_privacy.seeding import derive_seed
from fl_privacy.types import (
    Exchange,
    Failure,
    Observation,
    PositiveInt,
    PropertyScores,
)

Share = Annotated[float, Field(gt=0, le=1)]

ALL = "all"
"""What the setting ``layers`` calls the whole update."""


class PropertyInference(Component):
    """Tell from an update whether the batch behind it has a property, such as faces that smile.

    For each exchange the adversary takes the global model that was sent, and those sent before
    it, and simulates what clients would answer to them on batches of its auxiliary data, half
    of them with the property (of whose samples ``shares`` have it, in turn) and half without,
    by the clients' own local training. A classifier of pooled weight gradients
    (`adversaries.gradient_features`) learns from these and scores the observed update. In an
    aggregate of n clients one simulated client has the property and the n - 1 others have not.

    Deviations from [Melis]: their one classifier learns from all snapshots of a run, ours, one
    a round, from the ``window`` last ones up to the exchange's own. They are read from the
    recording (`Observation.history`), so a score is the same whatever other exchanges are handed
    in and whatever happens later. Updates of several local steps are met by updates of as many
    simulated steps, not by gradients. An adversary that is itself a client (``own_node``) has
    no part of its own to take off: the threat model hands in the aggregate of the others.
    """

    property: Annotated[
        str, Field(description="name of the property; empty: the only one of the auxiliary data")
    ] = ""
    classifier: Annotated[Family, Field(description="what learns to tell the batches apart")] = (
        "forest"
    )
    layers: Annotated[
        str,
        Field(description="all: the whole update; each: also every layer alone; or some, by comma"),
    ] = ALL
    batches: Annotated[
        int, Field(ge=10, description="auxiliary batches that a classifier learns from")
    ] = 256
    window: Annotated[
        PositiveInt, Field(description="global models they are spread over: the last, and its own")
    ] = 16
    batch_size: Annotated[
        PositiveInt | None, Field(description="images a simulated client; none: as the client's")
    ] = None
    shares: Annotated[
        tuple[Share, ...],
        Field(min_length=1, description="of property in batches that have it, in turn"),
    ] = (1.0, 0.4, 0.6, 0.8)
    warm_up: Annotated[int, Field(ge=0, description="first rounds that are not scored")] = 0
    together: Annotated[
        int, Field(ge=2, multiple_of=2, description="batches simulated at once; bounds the memory")
    ] = 8
    permuted: Annotated[
        bool,
        Field(description="deal the property out among people, so that it means nothing: the null"),
    ] = False

    requires: ClassVar[frozenset[str]] = frozenset({"auxiliary", "local_training"})

    def null(self) -> PropertyInference:
        """The same adversary, taught a property that means nothing.

        It is dealt out among the people of the auxiliary data, once for all rounds, as the real one
        is the same in all: what chance teaches of people who are alike goes on from round to
        round, and the AUC varies between runs by that too. Where people are unknown samples
        are dealt out, which leaves that out. Another seed deals anew.
        """
        return self.model_copy(update={"permuted": True})

    def scored_by(self, observation: Observation) -> tuple[str, ...]:
        """The metrics that score its results: one for the whole update, and one a layer.

        Raises:
            PropertyError: no such layer.
        """
        names = self.parts(observation, observation.model())
        return tuple("auc" if name == WHOLE else f"auc(layer={name!r})" for name in names)

    def check(self, observations: Sequence[Observation]) -> None:
        """Refuse what no target could be attacked with.

        Raises:
            PropertyError: an unknown property or layer, a property with one value, too few
                samples for a batch, or no round after the warm-up.
        """
        first = observations[0]
        assert first.auxiliary is not None, "checked against `requires` before any work"
        exchanges = [exchange for o in observations for exchange in o.exchanges]
        if all(self.too_early(exchange) for exchange in exchanges):
            raise PropertyError(
                f"the last recorded round is {max(e.round for e in exchanges)} and warm_up = "
                f"{self.warm_up}: expected {self.warm_up + 1} rounds or more, or a shorter warm_up"
            )
        self.parts(first, first.model())
        pool = pool_of(first.auxiliary, self.property)
        check_pool(pool, self.batch_size or fewest_images(observations), max(self.shares))

    def too_early(self, exchange: Exchange) -> bool:
        """Whether an exchange lies within the warm-up; a run that was resumed has none."""
        return exchange.attempt == 1 and exchange.round <= self.warm_up

    def parts(self, observation: Observation, model: nn.Module) -> tuple[str, ...]:
        """`WHOLE`, and the layers that are scored alone; none of a network that is one layer.

        Raises:
            PropertyError: no such layer; lists those there are.
        """
        seen = visible_layers(observation, model)
        if self.layers == ALL or seen == (WHOLE,):
            return (WHOLE,)
        wanted = seen if self.layers == "each" else tuple(map(str.strip, self.layers.split(",")))
        for name in wanted:
            if name not in seen:
                raise PropertyError(
                    f"layers={self.layers!r}: no layer {name!r} with a weight that is seen; "
                    f"expected all, each, or some of {', '.join(seen)}"
                )
        return (WHOLE, *wanted)

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[PropertyScores | Failure]:
        """Score every exchange of each target; those of one round and size share classifiers.

        Sizes are gone through one by one, so a target may wait for many others to be scored.
        """
        answers: list[Answers] = [{} for _ in observations]
        memory = Memory(seed, self.together, most=2 * self.window, permuted=self.permuted)
        following = 0
        groups = judged_together(observations, answers, self.too_early)
        done = sum(map(complete, observations, answers))
        for places in groups:
            for (i, j), answer in self.judged(observations, places, memory, device):
                answers[i][j] = answer
                done += complete(observations[i], answers[i])
            progress(done, len(observations))
            while following < len(answers) and complete(
                observations[following], answers[following]
            ):
                following += 1
                yield self.result(observations[following - 1], answers[following - 1])
        for observation, own in zip(observations[following:], answers[following:], strict=True):
            yield self.result(observation, own)

    def result(self, observation: Observation, answers: Answers) -> PropertyScores | Failure:
        """What comes of the answers to a target's exchanges."""
        try:
            assert observation.auxiliary is not None, "checked against `requires`"
            name = pool_of(observation.auxiliary, self.property).property
        except PropertyError as error:
            return Failure(observation.key, str(error))
        return result_of(observation, name, answers)

    def judged(
        self,
        observations: Sequence[Observation],
        places: Sequence[Place],
        memory: Memory,
        device: torch.device,
    ) -> Iterator[tuple[Place, Answer]]:
        """What classifiers that the exchanges at ``places`` share say of each."""
        start, (i, j) = time.perf_counter(), places[0]
        try:
            first = observations[i].exchanges[j]
            clients = self.clients(observations[i], first, memory, device)
            fitted = self.fit(observations[i], first, clients, memory)
        except (Unattackable, PropertyError, RecordingError) as error:
            yield from ((place, Answer({}, str(error))) for place in places)
            return
        shared = (time.perf_counter() - start) / len(places)
        for i, j in places:
            start = time.perf_counter()
            try:
                scores = fitted.scores(observations[i].exchanges[j])
            except (Unattackable, RecordingError) as error:
                yield (i, j), Answer({}, str(error))
            else:
                yield (i, j), Answer(scores, "", shared + time.perf_counter() - start)

    def clients(
        self, observation: Observation, exchange: Exchange, memory: Memory, device: torch.device
    ) -> Clients:
        """The clients behind an exchange, simulated on auxiliary data.

        Raises:
            Unattackable, PropertyError: why they cannot be.
        """
        auxiliary, training = observation.auxiliary, training_of(observation)
        assert auxiliary is not None, "checked against `requires` before any work"
        refuse_tokens(model := skeleton(observation.model(), training), observation.task)
        counts = tuple(self.batch_size or n for n in members_of(exchange, training))
        pool = memory.pool(auxiliary, self.property)
        check_pool(pool, max(counts), max(self.shares))
        layers = visible_layers(observation, model)
        return Clients(
            model, training, counts, observation.task, auxiliary, pool, self.shares, layers, device
        )

    def fit(
        self, observation: Observation, exchange: Exchange, clients: Clients, memory: Memory
    ) -> Fitted:
        """Classifiers for what ``clients`` answer to the global models up to an exchange's own.

        Raises:
            Unattackable: what they would answer is not finite.
        """
        window = window_of(observation, exchange, self.warm_up + 1, self.window)
        found, has = training_rows([memory.at(m, clients) for m in window], self.batches)
        where: tuple[int | str, ...] = (window[-1].digest, *clients.counts)
        fitted = {
            name: classifier(self.classifier, derive_seed(memory.seed, *where, name)).fit(
                rows_of(found, clients.layers, name).numpy(), has.numpy()
            )
            for name in self.parts(observation, clients.model)
        }
        members = members_of(exchange, clients.training)
        one_step = all(clients.training.steps(n) == 1 for n in members)
        return Fitted(fitted, clients.layers, clients.training, one_step)


def fewest_images(observations: Sequence[Observation]) -> int:
    """Images of the largest client behind an exchange, of the exchange where that has fewest.

    One client's claim thus refuses no attack on the others.
    """
    found = []
    for observation in observations:
        for exchange in observation.exchanges:
            with suppress(Unattackable):
                found.append(max(members_of(exchange, training_of(observation))))
    return min(found, default=1)

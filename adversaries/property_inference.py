"""Does a client's batch hold a property that has nothing to do with the task? The passive PIA.

Melis et al.: Exploiting Unintended Feature Leakage in Collaborative Learning, S&P 2019,
section 4, https://arxiv.org/abs/1805.04049.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from adversaries.auxiliary_batches import (
    PropertyError,
    check_pool,
    draw_batches,
    pool_of,
    simulated_features,
)
from adversaries.gradient_features import Family, classifier, joined
from adversaries.local_steps import skeleton
from adversaries.property_snapshot import (
    WHOLE,
    Fitted,
    Snapshot,
    client_of,
    snapshot_of,
    visible_layers,
)
from adversaries.targets import Unattackable, training_of
from adversaries.tokens import refuse_tokens
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.recording import RecordingError
from fl_privacy.seeding import derive_seed, generator
from fl_privacy.types import (
    Exchange,
    Failure,
    Observation,
    Outcome,
    PositiveInt,
    PropertyScores,
)

Share = Annotated[float, Field(gt=0, le=1)]

Place = tuple[int, int]
"""Number of a target and of one of its exchanges."""


@dataclass(frozen=True)
class Answer:
    """Layer, or `WHOLE` -> probability of the property; or the reason why there is none."""

    scores: Mapping[str, float]
    reason: str
    seconds: float = 0.0


class PropertyInference(Component):
    """Tell from an update whether the batch behind it has a property, such as faces that smile.

    For each exchange the adversary takes the global model that was sent and simulates what
    clients would answer on batches of its auxiliary data, half of them with the property (of
    whose samples ``shares`` have it, in turn) and half without, by the clients' own local
    training. A classifier of pooled weight gradients (`adversaries.gradient_features`) learns
    from these and scores the observed update. In an aggregate of n clients one simulated
    client has the property and the n - 1 others have not.

    Deviations from [Melis]: they pool the batches of all snapshots into one classifier; ours
    learns from ``batches`` at the exchange's own snapshot alone, so that a score is the same
    whatever else was recorded or handed in. Updates of several local steps are met by updates
    of as many simulated steps. An adversary that is itself a client (``own_node``) needs to
    take no part of its own off: the threat model hands in the aggregate of the others.
    """

    property: Annotated[
        str, Field(description="name of the property; empty: the only one of the auxiliary data")
    ] = ""
    classifier: Annotated[Family, Field(description="what is trained on each snapshot")] = "forest"
    layers: Annotated[
        str,
        Field(description="all: the whole update; each: also every layer alone; or some, by comma"),
    ] = WHOLE
    batches: Annotated[int, Field(ge=10, description="auxiliary batches a snapshot")] = 64
    batch_size: Annotated[
        PositiveInt | None, Field(description="images a simulated client; none: as the client's")
    ] = None
    shares: Annotated[
        tuple[Share, ...],
        Field(min_length=1, description="of property in batches that have it, in turn"),
    ] = (1.0, 0.4, 0.6, 0.8)
    warm_up: Annotated[int, Field(ge=0, description="first rounds that are not scored")] = 0
    together: Annotated[PositiveInt, Field(description="batches simulated at once")] = 8
    permuted: Annotated[
        bool, Field(description="shuffle the property in the auxiliary data: the null")
    ] = False

    requires: ClassVar[frozenset[str]] = frozenset({"auxiliary", "local_training"})

    def null(self) -> PropertyInference:
        """The same adversary, whose auxiliary data says nothing of the property."""
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
        sizes = {n for e in exchanges for n in e.members or (e.num_examples,) if n}
        check_pool(pool, self.batch_size or max(sizes, default=1), max(self.shares))

    def too_early(self, exchange: Exchange) -> bool:
        """Whether an exchange lies within the warm-up; a run that was resumed has none."""
        return exchange.attempt == 1 and exchange.round <= self.warm_up

    def parts(self, observation: Observation, model: nn.Module) -> tuple[str, ...]:
        """`WHOLE`, and the layers that are scored alone.

        Raises:
            PropertyError: no such layer; lists those there are.
        """
        seen = visible_layers(observation, model)
        if self.layers == WHOLE:
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
        """Score every exchange of each target; a snapshot's classifier serves all its answers."""
        answers: list[dict[int, Answer]] = [{} for _ in observations]
        following = 0
        for snapshot, places in self.by_snapshot(observations, answers).items():
            for (i, j), answer in self.scored(observations, snapshot, places, seed, device):
                answers[i][j] = answer
            while following < len(answers) and whole(observations[following], answers[following]):
                progress(following + 1, len(observations))
                yield self.result(observations[following], answers[following])
                following += 1
        for observation, own in zip(observations[following:], answers[following:], strict=True):
            yield self.result(observation, own)

    def by_snapshot(
        self, observations: Sequence[Observation], answers: list[dict[int, Answer]]
    ) -> dict[Snapshot, list[Place]]:
        """The exchanges to score, by snapshot; why the others are not goes to ``answers``."""
        found: dict[Snapshot, list[Place]] = {}
        for i, observation in enumerate(observations):
            for j, exchange in enumerate(observation.exchanges):
                try:
                    if self.too_early(exchange):
                        raise Unattackable(f"rounds up to warm_up = {self.warm_up} are not scored")
                    found.setdefault(snapshot_of(observation, exchange), []).append((i, j))
                except Unattackable as error:
                    answers[i][j] = Answer({}, str(error))
        return found

    def scored(
        self,
        observations: Sequence[Observation],
        snapshot: Snapshot,
        places: Sequence[Place],
        seed: int,
        device: torch.device,
    ) -> Iterator[tuple[Place, Answer]]:
        """What a snapshot's classifiers say of the exchanges at ``places``."""
        start, (i, j) = time.perf_counter(), places[0]
        try:
            fitted = self.fit(observations[i], observations[i].exchanges[j], snapshot, seed, device)
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

    def fit(
        self,
        observation: Observation,
        exchange: Exchange,
        snapshot: Snapshot,
        seed: int,
        device: torch.device,
    ) -> Fitted:
        """Classifiers for the answers to one global model.

        Raises:
            Unattackable, PropertyError: why there can be none.
        """
        auxiliary, training = observation.auxiliary, training_of(observation)
        assert auxiliary is not None, "checked against `requires` before any work"
        refuse_tokens(model := skeleton(observation.model(), training), observation.task)
        parts = self.parts(observation, model)
        layers = visible_layers(observation, model)
        counts = [self.batch_size or n for n in snapshot.counts]
        pool = pool_of(auxiliary, self.property)
        check_pool(pool, max(counts), max(self.shares))
        where: tuple[int | str, ...] = (snapshot.global_digest, *snapshot.counts)
        if self.permuted:
            pool = pool.permuted(generator(seed, *where, "permuted property"))
        draws = generator(seed, *where, "auxiliary batches")
        batches, has = draw_batches(pool, counts, self.shares, self.batches, draws)
        client = client_of(model, training, counts, exchange, device)
        found = simulated_features(
            client, observation.task, auxiliary, batches, layers, together=self.together
        )
        if not all(rows.isfinite().all() for rows in found.values()):
            raise Unattackable(
                "updates simulated at this global model are not finite: expected a model whose "
                "training has not diverged"
            )
        truth = has.numpy()
        classifiers = {
            name: classifier(self.classifier, derive_seed(seed, *where, name)).fit(
                joined(found, layers if name == WHOLE else (name,)).numpy(), truth
            )
            for name in parts
        }
        return Fitted(classifiers, layers, training, client.one_step)

    def result(
        self, observation: Observation, answers: Mapping[int, Answer]
    ) -> PropertyScores | Failure:
        """The scores of a target's exchanges; a failure where none could be scored."""
        told = [answers[j] for j in range(len(observation.exchanges))]
        silent_ones = [answer.reason for answer in told if answer.reason]
        if len(silent_ones) == len(told):
            return Failure(observation.key, silent_ones[0])
        assert observation.auxiliary is not None
        names = next(tuple(answer.scores) for answer in told if answer.scores)
        by_layer = {
            name: torch.tensor(
                [answer.scores.get(name, math.nan) for answer in told], dtype=torch.float64
            )
            for name in names
        }
        outcome = Outcome("completed")
        if silent_ones:
            outcome = Outcome(
                "partial", f"{len(silent_ones)} of {len(told)} rounds not scored: {silent_ones[0]}"
            )
        return PropertyScores(
            key=observation.key,
            scores=by_layer.pop(WHOLE),
            outcome=outcome,
            seconds=sum(answer.seconds for answer in told),
            property=pool_of(observation.auxiliary, self.property).property,
            by_layer=by_layer,
        )


def whole(observation: Observation, answers: Mapping[int, Answer]) -> bool:
    """Whether there is an answer for every exchange of a target."""
    return len(answers) == len(observation.exchanges)

"""Index lines into exchanges, and exchanges into what the server really sees of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from fl_privacy.claims import claim_flaw, most_examples
from fl_privacy.layers import trained_names
from fl_privacy.recording import Entry, Recording, RecordingError, match_names
from fl_privacy.types import Exchange, GlobalModel, LazyTensors, LocalTraining, Tensors


class ExchangeReader:
    """Turns index lines into exchanges of one model; tensors are read when asked for.

    A reply that does not fit the model gets a ``flaw`` and spares the others. What the
    server *sent* has to fit, or the model is the wrong one.

    Raises:
        RecordingError: the model does not fit what was sent.
    """

    def __init__(
        self, recording: Recording, model: nn.Module, training: LocalTraining | None = None
    ) -> None:
        self._recording = recording
        self._training = training
        self._state = model.state_dict()
        trained = set(trained_names(model))
        self.parameters = tuple(n for n in self._state if n in trained)
        self._buffers = tuple(
            n for n, t in self._state.items() if n not in trained and t.is_floating_point()
        )
        self._names: dict[str, dict[str, str] | str] = {}
        self._sent: dict[str, Tensors] = {}

    def exchange(self, entry: Entry) -> Exchange:
        """One exchange."""
        sent = self._sent_tensors(entry)
        found = self._returned_names(entry)
        flaw = found if isinstance(found, str) else self._claim(entry)
        exchange = Exchange(
            attempt=entry.attempt,
            round=entry.round,
            node=entry.node,
            num_examples=None,
            digest=entry.sha256,
            global_digest=entry.global_digest,
            parameters=_only(sent, self.parameters),
            buffers=_only(sent, self._buffers),
            update={},
            returned_buffers={},
            flaw=flaw,
        )
        if flaw or isinstance(found, str):
            return exchange
        names, returned = found, self._recording.returned(entry)

        def update(name: str) -> Tensor:
            new = returned[names[name]]
            if not new.is_floating_point():  # which the schema of a sparse update cannot rule out
                raise RecordingError(
                    f"the reply holds {name!r} in a type that is not floating-point"
                )
            return new if entry.payload == "update" else new - sent[name]

        return replace(
            exchange,
            num_examples=entry.num_examples,
            update=LazyTensors(self.parameters, update),
            returned_buffers=LazyTensors(self._buffers, lambda name: returned[names[name]]),
        )

    def history(self, entries: Iterable[Entry]) -> tuple[GlobalModel, ...]:
        """What was sent, in order, once for each round that sent it; read when asked for."""

        def sent(entry: Entry) -> GlobalModel:
            def load(name: str) -> Tensor:
                return self._sent_tensors(entry)[name]

            return GlobalModel(
                entry.attempt,
                entry.round,
                entry.global_digest,
                LazyTensors(self.parameters, load),
                LazyTensors(self._buffers, load),
            )

        firsts = {(e.attempt, e.round, e.global_digest): e for e in reversed(list(entries))}
        return tuple(sent(entry) for entry in reversed(firsts.values()))

    def _sent_tensors(self, entry: Entry) -> Tensors:
        """What was sent, by the model's names; read once for each content."""
        if entry.global_digest not in self._sent:
            tensors = self._recording.sent(entry)
            recorded = match_names(self._state, self._recording.sent_schema(entry))
            names = {own: theirs for theirs, own in recorded.items()}
            self._sent[entry.global_digest] = LazyTensors(
                tuple(self._state), lambda name: tensors[names[name]]
            )
        return self._sent[entry.global_digest]

    def _returned_names(self, entry: Entry) -> dict[str, str] | str:
        """The model's names to the recorded ones, or what is wrong with the reply."""
        sha = entry.schema_digest
        if sha not in self._names:
            schema = self._recording.schema(sha)
            odd = [t.name for t in schema.tensors if "float" not in t.dtype]
            try:
                recorded = match_names(self._state, schema)
                names = {own: theirs for theirs, own in recorded.items()}
                wrong = [n for n in self.parameters if names[n] in odd]
                self._names[sha] = (
                    f"the reply holds {names[wrong[0]]!r} in a type that is not floating-point"
                    if wrong
                    else names
                )
            except RecordingError as error:
                self._names[sha] = f"the reply does not fit the model: {error}"
        return self._names[sha]

    def _claim(self, entry: Entry) -> str:
        """What is wrong with the number of examples that the client claims, or nothing."""
        if entry.num_examples is None:
            return ""
        return claim_flaw(entry.num_examples, most_examples(self._training))


def link(
    exchanges: Sequence[Exchange], unit: Literal["update", "client", "aggregate"]
) -> list[tuple[Exchange, ...]]:
    """Exchanges grouped into targets: one each, a client's rounds, or a round's mean."""
    if unit == "update":
        return [(exchange,) for exchange in exchanges]
    by = _client if unit == "client" else _round
    groups = [tuple(group) for _, group in groupby(sorted(exchanges, key=by), key=by)]
    return groups if unit == "client" else [(aggregate(group),) for group in groups]


def aggregate(exchanges: Sequence[Exchange]) -> Exchange:
    """What secure aggregation shows of one round: ``sum(n_i u_i) / sum(n_i)`` in float64.

    ``node`` joins the members' names by ``+``. A member whose weight is unknown, or whose
    reply is flawed, leaves an aggregate that cannot be used.
    """
    first = exchanges[0]
    counts = tuple(exchange.num_examples or 0 for exchange in exchanges)
    total = sum(counts)
    flaws = [exchange.flaw for exchange in exchanges if exchange.flaw]
    if not all(counts):
        flaws.append("an aggregate weighs by num-examples, which at least one reply lacks")

    def load(name: str) -> Tensor:
        weighted = [n * e.update[name].double() for n, e in zip(counts, exchanges, strict=True)]
        return torch.stack(weighted).sum(0) / total

    return replace(
        first,
        node="+".join(exchange.node for exchange in exchanges),
        num_examples=None if flaws else total,
        digest=digest(*(exchange.digest for exchange in exchanges)),
        update={} if flaws else LazyTensors(tuple(first.update), load),
        returned_buffers={},
        members=counts,
        flaw=flaws[0] if flaws else "",
    )


def incomplete(exchange: Exchange, missing: int) -> Exchange:
    """An exchange, of no use to an aggregate if replies of its round are ``missing``."""
    if not missing:
        return exchange
    return replace(
        exchange,
        update={},
        returned_buffers={},
        flaw=f"{missing} of the round's replies could not be recorded, so its sum is not known",
    )


def digest(*parts: str) -> str:
    """SHA-256 of parts that contain no line breaks, as 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _only(tensors: Tensors, names: tuple[str, ...]) -> LazyTensors:
    return LazyTensors(names, tensors.__getitem__)


def _client(exchange: Exchange) -> tuple[int, str]:
    return exchange.attempt, exchange.node


def _round(exchange: Exchange) -> tuple[int, int]:
    return exchange.attempt, exchange.round

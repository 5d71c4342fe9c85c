"""What the adversary may know and see, and the only place that makes an `Observation`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fl_privacy import component
from fl_privacy.component import Component, ComponentError
from fl_privacy.recording import Entry, Recording, match_names
from fl_privacy.rounds import parse_rounds
from fl_privacy.types import (
    Exchange,
    LazyTensors,
    ModelFactory,
    Observation,
    Samples,
    Task,
    Tensors,
)

Oracle = Callable[[Exchange], Tensor]
"""Gives the true labels ``[images]`` of an exchange; only an audit has one."""

GRANTS = {
    "labels": 'labels = "oracle" (needs an audited run)',
    "local_training": "local_training = true (and a recording whose manifest holds it)",
    "auxiliary": 'auxiliary = "DATASET", such as "fashion-mini"',
    "own_update": "own_node = NODE, for an adversary that is itself a client",
    "defense": 'defense = "DEFENSE", such as "gaussian_noise(scale=0.1)"',
}
"""The setting of the threat model that grants each optional field."""


class ThreatModelError(ValueError):
    """The threat model and the recording, or the adversary, do not go together."""


class ThreatModel(Component):
    """An honest-but-curious server, and everything it is assumed to know.

    Default: individual updates; labels inferred; learning rate, number of steps and
    batch size known because the server prescribed them; nothing else.
    """

    unit: Annotated[
        Literal["update", "client", "aggregate"],
        Field(description="one update, one client's rounds together, or a round's weighted mean"),
    ] = "update"
    labels: Annotated[
        Literal["inferred", "oracle"], Field(description="oracle: told by the audit")
    ] = "inferred"
    local_training: Annotated[bool, Field(description="knows learning rate, steps, batch size")] = (
        True
    )
    auxiliary: Annotated[str, Field(description="dataset whose test split the adversary holds")] = (
        ""
    )
    withheld: Annotated[
        tuple[str, ...], Field(description="parameters it does not see; a prefix hides a layer")
    ] = ()
    defense: Annotated[str, Field(description="defense it knows of and adapts to")] = ""

    @property
    def oracles(self) -> tuple[str, ...]:
        """What is granted that no server has."""
        return ("labels",) if self.labels == "oracle" else ()

    def observe(
        self,
        recording: Recording,
        *,
        model: ModelFactory | None = None,
        task: Task | None = None,
        oracle: Oracle | None = None,
        rounds: str = "",
    ) -> list[Observation]:
        """The targets of a recording, in the order of recording; tensors load lazily.

        ``model`` and ``task`` default to those in the manifest; ``rounds`` such as ``1-5,10``.

        Raises:
            ThreatModelError: no model or task is known, labels are granted without an
                ``oracle``, or there is nothing to observe.
            RecordingError: the model does not fit the recorded tensors.
        """
        task = task or recording.manifest.task
        if task is None:
            raise ThreatModelError(
                "the recording names no task (input shape, classes): give one with --task FILE.toml"
            )
        model = model or manifest_model(recording, task)
        if self.labels == "oracle" and oracle is None:
            raise ThreatModelError(
                'labels = "oracle" needs the truth of an audited run (audit=true); none was found'
            )
        reader = _Reader(recording, model())
        wanted = parse_rounds(rounds)
        targets = self._targets((e for e in recording.entries() if wanted(e.round)), reader)
        auxiliary = load_auxiliary(self.auxiliary)
        defense = component.create_all("defenses", self.defense) or None
        observations = [
            Observation(
                key=digest(self.unit, *(exchange.digest for exchange in exchanges)),
                exchanges=exchanges,
                model=model,
                task=task,
                labels=torch.cat([oracle(e) for e in exchanges])
                if oracle and self.labels == "oracle"
                else None,
                local_training=recording.manifest.local_training if self.local_training else None,
                auxiliary=auxiliary,
                defense=defense,
                withheld=self._hidden(exchanges[0].update),
            )
            for exchanges in targets
        ]
        if not observations:
            raise ThreatModelError(
                "the recording lists no update to observe"
                + (f" in rounds {rounds}" if rounds else "")
            )
        return observations

    def _targets(self, entries: Iterable[Entry], reader: _Reader) -> list[tuple[Exchange, ...]]:
        exchanges = [reader.exchange(entry) for entry in entries]
        if self.unit == "update":
            return [(exchange,) for exchange in exchanges]
        by = _client if self.unit == "client" else _round
        exchanges.sort(key=by)
        groups = [tuple(group) for _, group in groupby(exchanges, key=by)]
        return groups if self.unit == "client" else [(aggregate(group),) for group in groups]

    def _hidden(self, parameters: Iterable[str]) -> tuple[str, ...]:
        names = tuple(parameters)
        hidden = tuple(
            n for n in names if any(n == w or n.startswith(f"{w}.") for w in self.withheld)
        )
        unknown = [
            w for w in self.withheld if not any(n == w or n.startswith(f"{w}.") for n in names)
        ]
        if unknown:
            raise ThreatModelError(
                f"withheld names {unknown[0]!r}, which is no parameter or layer; parameters: "
                f"{', '.join(names)}"
            )
        return hidden


def check_requirements(requires: Iterable[str], observation: Observation, name: str) -> None:
    """Refuse before any work when an adversary lacks a field it needs.

    Raises:
        ThreatModelError: names the field and the setting that grants it.
    """
    for field in sorted(requires):
        if getattr(observation, field) is None:
            raise ThreatModelError(
                f"{name} needs {field}, which the threat model does not grant: "
                f"set {GRANTS.get(field, field)}"
            )


def aggregate(exchanges: Sequence[Exchange]) -> Exchange:
    """What secure aggregation shows of one round: ``sum(n_i u_i) / sum(n_i)`` in float64.

    ``node`` joins the members' names by ``+``.

    Raises:
        ThreatModelError: a client's number of examples is unknown.
    """
    counts = [exchange.num_examples for exchange in exchanges]
    known = [count for count in counts if count]
    if len(known) < len(counts):
        raise ThreatModelError(
            'unit = "aggregate" weighs by num-examples, which at least one reply lacks'
        )
    total = sum(known)
    first = exchanges[0]

    def load(name: str) -> Tensor:
        weighted = [n * e.update[name].double() for n, e in zip(known, exchanges, strict=True)]
        return torch.stack(weighted).sum(0) / total

    return Exchange(
        attempt=first.attempt,
        round=first.round,
        node="+".join(exchange.node for exchange in exchanges),
        num_examples=total,
        digest=digest(*(exchange.digest for exchange in exchanges)),
        global_digest=first.global_digest,
        parameters=first.parameters,
        buffers=first.buffers,
        update=LazyTensors(tuple(first.update), load),
        returned_buffers={},
    )


def digest(*parts: str) -> str:
    """SHA-256 of parts that contain no line breaks, as 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def manifest_model(recording: Recording, task: Task) -> ModelFactory:
    """The factory of the model that the manifest names.

    Raises:
        ThreatModelError: it names none, or one that is not installed.
    """
    spec = recording.manifest.model
    if spec is None:
        raise ThreatModelError(
            "the recording names no model: give one with --model package.module:factory"
        )
    try:
        architecture = component.create("models", spec)
    except ComponentError as error:
        raise ThreatModelError(f"the recording was made with a model we lack: {error}") from None

    def build() -> nn.Module:
        model: nn.Module = architecture.build(task, seed=0)
        return model

    return build


def load_auxiliary(spec: str) -> Samples | None:
    """The test split of a dataset, or None for an empty text."""
    if not spec:
        return None
    samples: Samples = component.create("datasets", spec).load("test")
    return samples


def _client(exchange: Exchange) -> tuple[int, str]:
    return exchange.attempt, exchange.node


def _round(exchange: Exchange) -> tuple[int, int]:
    return exchange.attempt, exchange.round


class _Reader:
    """Turns index lines into exchanges of one model."""

    def __init__(self, recording: Recording, model: nn.Module) -> None:
        self._recording = recording
        self._state = model.state_dict()
        parameters = {name for name, _ in model.named_parameters()}
        self._parameters = tuple(n for n in self._state if n in parameters)
        self._buffers = tuple(
            n for n, t in self._state.items() if n not in parameters and t.is_floating_point()
        )
        self._names: dict[str, dict[str, str]] = {}
        self._sent: dict[str, Tensors] = {}

    def exchange(self, entry: Entry) -> Exchange:
        """One exchange; tensors are read when asked for."""
        if entry.schema_digest not in self._names:
            schema = self._recording.schema(entry.schema_digest)
            recorded = match_names(self._state, schema)
            self._names[entry.schema_digest] = {own: theirs for theirs, own in recorded.items()}
        names = self._names[entry.schema_digest]
        if entry.global_digest not in self._sent:
            self._sent[entry.global_digest] = self._recording.sent(entry)
        sent, returned = self._sent[entry.global_digest], self._recording.returned(entry)

        def update(name: str) -> Tensor:
            new = returned[names[name]]
            return new if entry.payload == "update" else new - sent[names[name]]

        def renamed(tensors: Tensors, wanted: tuple[str, ...]) -> LazyTensors:
            return LazyTensors(wanted, lambda name: tensors[names[name]])

        return Exchange(
            attempt=entry.attempt,
            round=entry.round,
            node=entry.node,
            num_examples=entry.num_examples,
            digest=entry.sha256,
            global_digest=entry.global_digest,
            parameters=renamed(sent, self._parameters),
            buffers=renamed(sent, self._buffers),
            update=LazyTensors(self._parameters, update),
            returned_buffers=renamed(returned, self._buffers),
        )

"""What the adversary may know and see, and the only place that makes an `Observation`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from fl_privacy import component
from fl_privacy.component import Component, ComponentError
from fl_privacy.custom_model import check_runs
from fl_privacy.exchanges import ExchangeReader, digest, incomplete, link
from fl_privacy.parameter_names import within
from fl_privacy.recording import Recording
from fl_privacy.rounds import parse_rounds
from fl_privacy.types import (
    Exchange,
    LocalTraining,
    ModelFactory,
    Observation,
    Samples,
    Task,
)

Oracle = Callable[[Exchange], Tensor]
"""Gives the true labels ``[images]`` of an exchange; only an audit has one."""

GRANTS = {
    "labels": 'labels = "oracle" (needs an audited run)',
    "local_training": "local_training = true",
    "auxiliary": 'auxiliary = "DATASET", such as "fashion-mini"',
    "own_update": 'own_node = "NODE", for an adversary that is itself a client',
    "defense": 'defense = "DEFENSE", such as "gaussian_noise(scale=0.1)"',
}
"""The setting of the threat model that grants each optional field."""

TRAINING = 'training = {algorithm = "fedsgd", lr = 0.01, epochs = 1, batch_size = 1}'
"""The line of a threat model that says what the clients did, where the recording does not."""


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
    training: Annotated[
        LocalTraining | None, Field(description="local training, when the recording names none")
    ] = None
    auxiliary: Annotated[str, Field(description="dataset whose test split the adversary holds")] = (
        ""
    )
    withheld: Annotated[
        tuple[str, ...], Field(description="parameters it does not see; a prefix hides a layer")
    ] = ()
    own_node: Annotated[
        str, Field(description="node of the adversary itself, whose updates it knows")
    ] = ""
    defense: Annotated[str, Field(description="defense it is told of")] = ""

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
            RecordingError: the model does not fit what the server sent.
            ModelError: the model does not fit the task.
        """
        task = task or manifest_task(recording)
        model = model or manifest_model(recording, task)
        if self.labels == "oracle" and oracle is None:
            raise ThreatModelError(
                'labels = "oracle" needs the truth of an audited run (audit=true); none was found'
            )
        training = self.training or recording.manifest.local_training
        network = model()
        reader = ExchangeReader(recording, network, training)
        wanted = parse_rounds(rounds)
        entries = list(recording.entries())
        kept_out = {(r.attempt, r.n) for r in recording.refusals()}
        summed = self.unit == "aggregate"  # of which the server's screening kept some out
        exchanges = [
            reader.exchange(e)
            for e in entries
            if wanted(e.round) and not (summed and (e.attempt, e.n) in kept_out)
        ]
        own = {(e.attempt, e.round): e.update for e in exchanges if e.node == self.own_node}
        if summed:
            missing = Counter(
                (e.attempt, e.round)
                for e in recording.entries(status="error")
                if e.unrecorded and e.node != self.own_node and (e.attempt, e.n) not in kept_out
            )
            exchanges = [incomplete(e, missing[e.attempt, e.round]) for e in exchanges]
        check_runs(network, task)
        targets = link([e for e in exchanges if e.node != self.own_node], self.unit)
        if not targets:
            raise ThreatModelError(
                "the recording lists no update to observe"
                + (f" in rounds {rounds}" if rounds else "")
            )
        hidden = self._hidden(reader.parameters)
        auxiliary = load_auxiliary(self.auxiliary, task)
        defense = component.create_all("defenses", self.defense) or None
        history = reader.history(entries)
        told = oracle if self.labels == "oracle" else None
        return [
            Observation(
                key=digest(self.unit, *(exchange.digest for exchange in linked)),
                exchanges=linked,
                model=model,
                task=task,
                labels=told(linked[0]) if told else None,
                local_training=training if self.local_training else None,
                auxiliary=auxiliary,
                own_update=own.get((linked[0].attempt, linked[0].round)),
                defense=defense,
                withheld=hidden,
                history=history,
            )
            for linked in targets
        ]

    def _hidden(self, parameters: Iterable[str]) -> tuple[str, ...]:
        names = tuple(parameters)
        hidden = tuple(n for n in names if any(within(n, layer) for layer in self.withheld))
        unknown = [layer for layer in self.withheld if not any(within(n, layer) for n in names)]
        if unknown:
            raise ThreatModelError(
                f"withheld names {unknown[0]!r}, which is no parameter or layer; parameters: "
                f"{', '.join(names)}"
            )
        return hidden


def check_requirements(
    requires: Iterable[str], observation: Observation, granted: ThreatModel, name: str
) -> None:
    """Refuse before any work when an adversary lacks a field it needs.

    Raises:
        ThreatModelError: names the field and the setting that grants it.
    """
    for field in sorted(requires):
        if getattr(observation, field) is None:
            if field == "local_training" and granted.local_training:
                raise ThreatModelError(
                    f"{name} needs local_training, which the recording does not name: set it, "
                    f"with your clients' values, in the file of --threat-model: {TRAINING}"
                )
            raise ThreatModelError(
                f"{name} needs {field}, which the threat model does not grant: "
                f"set {GRANTS.get(field, field)} in the file of --threat-model"
            )


def manifest_task(recording: Recording) -> Task:
    """The task that the manifest names.

    Raises:
        ThreatModelError: it names none.
    """
    task = recording.manifest.task
    if task is None:
        raise ThreatModelError(
            "the recording names no task: give one with --task FILE.toml, which holds "
            "input_shape = [channels, height, width], classes, mean and std"
        )
    return task


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


def load_auxiliary(spec: str, task: Task) -> Samples | None:
    """The test split of a dataset, or None for an empty text.

    Raises:
        ThreatModelError: its inputs have another shape than the task's.
    """
    if not spec:
        return None
    samples: Samples = component.create("datasets", spec).load("test")
    if tuple(samples.inputs.shape[1:]) != task.input_shape:
        raise ThreatModelError(
            f"auxiliary {spec!r} has inputs of shape {tuple(samples.inputs.shape[1:])}: expected "
            f"those of the task, {task.input_shape}"
        )
    return samples

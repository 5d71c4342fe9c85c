"""What a plug-in has to look like. All protocols are structural."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from fl_privacy.types import (
    Failure,
    LayerScores,
    LocalTraining,
    Observation,
    Result,
    Samples,
    Stats,
    Step,
    Task,
    Tensors,
)


class Progress(Protocol):
    """Called as work gets done; must be cheap.

    ``loss`` stays a tensor so that the attack never waits for the device: the
    display reads it when it redraws.
    """

    def __call__(self, done: int, total: int, *, loss: Tensor | None = None) -> None: ...


def silent(done: int, total: int, *, loss: Tensor | None = None) -> None:
    """A `Progress` that shows nothing."""


@runtime_checkable
class Adversary(Protocol):
    """Turns observations into results, one for each, in order.

    ``requires`` names the `Observation` fields that must be granted.
    """

    @property
    def requires(self) -> frozenset[str]: ...

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Result | Failure]: ...


@runtime_checkable
class Inferring(Protocol):
    """An adversary that reconstructs no inputs, and so is scored and compared in its own way."""

    def check(self, observations: Sequence[Observation]) -> None:
        """Raise a ValueError, before any work, where no target could be treated."""

    def scored_by(self, observation: Observation) -> tuple[str, ...]:
        """The metrics, as specs, in place of those of reconstructions."""

    def null(self) -> Adversary:
        """The same adversary without what tells it anything, in place of the baseline."""


@runtime_checkable
class OfProperty(Protocol):
    """An adversary that infers a property of its auxiliary data; empty: the only one there is."""

    @property
    def property(self) -> str: ...


@runtime_checkable
class LayerMetric(Protocol):
    """Measures how much each layer of an update tells (the auditor's tool)."""

    needs: ClassVar[Literal["updates", "property", "data"]]

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores: ...


@runtime_checkable
class Metric(Protocol):
    """Scores results against the truth; pure.

    ``score`` gives one value for each result, or a single one when ``set_level``. A ``unit``
    that begins with "share" says that values lie in [0, 1], where their intervals then stay.
    A class variable ``kinds`` names the types of result it scores, without it reconstructions.
    """

    unit: ClassVar[str]
    higher_is_leakier: ClassVar[bool]
    set_level: ClassVar[bool]

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor: ...


@runtime_checkable
class SetMetric(Protocol):
    """A set-level `Metric`: the results keep what each of them adds to the set."""

    def part(self, result: Result) -> Tensor:
        """The scores ``[exchanges]`` of one result; NaN where there is none."""


@runtime_checkable
class ObservedMetric(Protocol):
    """A `Metric` that needs the observed network; ``score_observed`` takes the place of ``score``.

    It gets results and truths as they are, in the task's own range. ``check_observed``
    refuses an observation it cannot be used on, before any attack.
    """

    def check_observed(self, observation: Observation) -> None: ...

    def score_observed(
        self,
        results: Sequence[Result],
        truths: Sequence[Samples],
        observations: Sequence[Observation],
    ) -> Tensor: ...


@runtime_checkable
class GradientDefense(Protocol):
    """Replaces the gradient of one local step; pure, twice differentiable."""

    sampling: ClassVar[Literal["shuffle", "poisson"]]

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]: ...


@runtime_checkable
class UpdateDefense(Protocol):
    """Replaces the update (returned minus sent) before it leaves the client; pure."""

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]: ...


@runtime_checkable
class Noisy(Protocol):
    """A defense that draws noise of mean zero and can say what it does apart from that.

    An adversary that puts the defense inside its objective simulates this: the noise itself
    cannot be. None: nothing but the noise.
    """

    def without_noise(self) -> GradientDefense | UpdateDefense | None: ...


@runtime_checkable
class Costly(Protocol):
    """A gradient defense that may take much longer than the step it defends."""

    def rehearsal(self) -> GradientDefense:
        """The cheapest that fails where the defense would fail."""

    def warning(self, model: nn.Module, training: LocalTraining) -> str:
        """What a run should be told of the price before it starts; empty: nothing."""


@runtime_checkable
class Model(Protocol):
    """A network architecture that fits itself to a task."""

    def build(self, task: Task, *, seed: int) -> nn.Module: ...


@runtime_checkable
class Dataset(Protocol):
    """A source of labelled inputs with a train and a test split."""

    def task(self) -> Task: ...

    def labels(self, split: Literal["train", "test"]) -> Tensor: ...

    def load(self, split: Literal["train", "test"], indices: Tensor | None = None) -> Samples: ...


@runtime_checkable
class Attributed(Protocol):
    """A dataset that tells the properties ``[n]`` of a split's samples without their inputs."""

    def property_values(self, split: Literal["train", "test"]) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Partition(Protocol):
    """Shares the training split among clients.

    ``indices`` gives the sample indices of client ``client`` of ``clients``, the
    same in every process for the same seed.
    """

    def indices(self, labels: Tensor, client: int, clients: int, *, seed: int) -> Tensor: ...

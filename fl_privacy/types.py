"""The values that travel between the parts: exchanges, observations, results.

Shapes are written in brackets: ``[n, *input_shape]``. Inputs are always in
*pixel space*, the range ``Task.low .. Task.high`` (0 to 1 for images); the
network sees ``Task.normalize(inputs)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

if TYPE_CHECKING:
    from fl_privacy.protocols import GradientDefense, UpdateDefense

Tensors = Mapping[str, Tensor]
"""Named tensors in the order of the model's ``state_dict``."""

Stats = Mapping[str, float | Tensor]
"""Named scalars a defense reports about one step or update.

Computed values stay 0-d tensors: a defense then runs inside ``torch.func`` transforms and
never waits for the device. Clients turn them into floats when they store them.
"""

ModelFactory = Callable[[], nn.Module]

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors that are read (or computed) each time they are asked for.

    Nothing is cached, so that ten thousand targets cost the memory of the few
    that are in use.
    """

    def __init__(self, names: tuple[str, ...], load: Callable[[str], Tensor]) -> None:
        self._names = names
        self._load = load

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Task(BaseModel):
    """What the federation learns: shape and range of an input, classes, loss.

    ``mean`` and ``std`` hold one number for each channel (the first axis of
    ``input_shape``), in pixel units.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_shape: tuple[PositiveInt, ...]
    classes: Annotated[int, Field(ge=2)]
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    low: float = 0.0
    high: float = 1.0
    loss: Literal["cross_entropy"] = "cross_entropy"
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("mean", "std"):
            got = len(getattr(self, name))
            if got != self.input_shape[0]:
                raise ValueError(
                    f"{name} needs one value for each of the {self.input_shape[0]} channels "
                    f"of input_shape {self.input_shape}, got {got}"
                )
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"class_names needs {self.classes} names, got {len(self.class_names)}")
        return self

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(self.mean),) + (1,) * (len(self.input_shape) - 1)
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(shape)
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device).view(shape)
        return mean, std

    def normalize(self, inputs: Tensor) -> Tensor:
        """Pixel space ``[..., *input_shape]`` to what the network sees."""
        mean, std = self._moments(inputs)
        return (inputs - mean) / std

    def denormalize(self, inputs: Tensor) -> Tensor:
        """What the network sees back to pixel space; the inverse of `normalize`."""
        mean, std = self._moments(inputs)
        return inputs * std + mean


class LocalTraining(BaseModel):
    """How a client turns its data into an update: everything the server prescribed.

    ``fedsgd`` takes one step on one batch, ``fedavg`` takes ``epochs`` passes in
    batches of ``batch_size``. ``order`` says whether the order of the samples is
    known to whoever holds this record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    algorithm: Literal["fedsgd", "fedavg"] = "fedsgd"
    optimizer: str = "sgd"
    lr: PositiveFloat = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 1
    drop_last: bool = False
    order: Literal["shuffled", "sequential"] = "shuffled"
    batch_norm: Literal["train", "eval"] = "train"

    def steps(self, num_examples: int) -> int:
        """Number of optimizer steps behind an update of ``num_examples`` examples."""
        if self.algorithm == "fedsgd":
            return 1
        batches = num_examples / self.batch_size
        return self.epochs * (math.floor(batches) if self.drop_last else math.ceil(batches))

    def images(self, num_examples: int) -> int:
        """Number of examples that an update of ``num_examples`` was really computed on."""
        dropped = self.algorithm == "fedavg" and self.drop_last
        return num_examples - num_examples % self.batch_size if dropped else num_examples


@dataclass(frozen=True)
class Samples:
    """Labelled inputs: ``inputs [n, *input_shape]`` float32 pixels, ``labels [n]`` int64.

    ``properties`` maps an attribute name to one value for each sample, ``[n]``. ``people [n]``
    numbers the person behind each sample; None where that is unknown.
    """

    inputs: Tensor
    labels: Tensor
    properties: Mapping[str, Tensor] = field(default_factory=dict)
    people: Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, indices: Tensor) -> Samples:
        """The chosen samples, with all that is known of them; ``indices`` may be a mask."""
        return Samples(
            self.inputs[indices],
            self.labels[indices],
            {name: values[indices] for name, values in self.properties.items()},
            None if self.people is None else self.people[indices],
        )

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """One after the other; ``parts``, at least one, have the same properties.

        People are known where they are in every part, and have the same number in each.
        """
        people = [part.people for part in parts if part.people is not None]
        return Samples(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.labels for part in parts]),
            {n: torch.cat([part.properties[n] for part in parts]) for n in parts[0].properties},
            torch.cat(people) if len(people) == len(parts) else None,
        )


@dataclass(frozen=True)
class Exchange:
    """One round trip of one client, as the server saw it.

    ``update`` is returned minus sent, trained parameters only, in weight units: the gradient
    of one SGD step is ``-update / lr``. Frozen parameters stand among the ``buffers``, being as
    constant as these in a round. ``digest`` is the
    SHA-256 of the stored reply, ``global_digest`` that of the sent parameters. ``members``
    are the numbers of examples of the clients behind an aggregate, empty for one client.
    ``flaw`` says why the reply cannot be used (then ``update`` is empty), else nothing.
    """

    attempt: int
    round: int
    node: str
    num_examples: int | None
    digest: str
    global_digest: str
    parameters: Tensors
    buffers: Tensors
    update: Tensors
    returned_buffers: Tensors
    members: tuple[int, ...] = ()
    flaw: str = ""


@dataclass(frozen=True)
class GlobalModel:
    """Parameters and buffers that were sent in a round, all as in `Exchange`."""

    attempt: int
    round: int
    digest: str
    parameters: Tensors
    buffers: Tensors


@dataclass(frozen=True)
class Observation:
    """One target of an adversary and what the threat model lets it know.

    Only `ThreatModel.observe` makes one. A field that is not granted is None. ``history`` are
    all global models of the recording, in order, whichever rounds are attacked.
    """

    key: str
    exchanges: tuple[Exchange, ...]
    model: ModelFactory
    task: Task
    labels: Tensor | None = None
    local_training: LocalTraining | None = None
    auxiliary: Samples | None = None
    own_update: Tensors | None = None
    defense: tuple[GradientDefense | UpdateDefense, ...] | None = None
    withheld: tuple[str, ...] = ()
    history: tuple[GlobalModel, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How an attack ended, and a sentence that says what to try next."""

    status: Literal["completed", "diverged", "partial"]
    message: str = ""


@dataclass(frozen=True)
class Reconstruction:
    """Inputs an adversary believes the target held: ``inputs [n, *input_shape]``.

    ``labels [n]``; ``loss`` is the adversary's own final objective (no truth in
    it), ``seconds`` its share of the device time.
    """

    key: str
    inputs: Tensor
    labels: Tensor
    outcome: Outcome
    loss: float = math.nan
    seconds: float = math.nan


@dataclass(frozen=True)
class PropertyScores:
    """One property score for each exchange of the target: ``scores [exchanges]``.

    Higher says that the batch has the ``property`` rather; NaN that there is no score.
    ``by_layer`` holds the same for each layer on which a score was also based alone.
    """

    key: str
    scores: Tensor
    outcome: Outcome
    seconds: float = math.nan
    property: str = ""
    by_layer: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Representations:
    """What an adversary believes the dense layers saw of each class it found.

    ``classes [c]`` int64, ascending. ``layers`` maps the name of a dense layer to its inputs,
    ``[c, features]``, a row a class; in the order of the forward pass.
    """

    key: str
    classes: Tensor
    layers: Tensors
    outcome: Outcome
    seconds: float = math.nan


@dataclass(frozen=True)
class Failure:
    """The adversary cannot treat this target: why, and what would change that."""

    key: str
    reason: str


Result = Reconstruction | PropertyScores | Representations


@dataclass(frozen=True)
class LayerScores:
    """One value (and standard error) for each layer: ``values [layers]``."""

    metric: str
    unit: str
    layers: tuple[str, ...]
    values: Tensor
    standard_errors: Tensor | None = None
    n: int = 0
    columns: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One local training step, as a gradient defense sees it.

    ``loss(outputs [n, classes], labels [n]) -> [n]`` is the per-sample loss;
    ``inputs`` are normalized. ``expected_batch_size`` is the nominal batch size,
    which differs from ``len(labels)`` under Poisson sampling.
    """

    model: nn.Module
    parameters: Tensors
    buffers: Tensors
    inputs: Tensor
    labels: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    expected_batch_size: int

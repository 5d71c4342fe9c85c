"""Data sources whose samples show people with attributes; three groups of people, disjoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.datasets.arrays import Arrays, DatasetError, Split, check_indices, moments
from fl_privacy.datasets.properties import (
    AttributeTable,
    Group,
    Phi,
    check_property,
    main_labels,
    split_people,
    tell_relation,
)
from fl_privacy.types import PositiveFloat, PositiveInt, Samples, Task


def _absolute(path: str) -> str:
    if path and not Path(path).is_absolute():
        raise ValueError("expected an absolute path")
    return path


AbsolutePath = Annotated[str, AfterValidator(_absolute)]

MainTask = Annotated[
    str | tuple[str, ...],
    Field(description="an attribute (two classes), or several, of which a sample has one"),
]

PictureSize = Annotated[
    tuple[PositiveInt, PositiveInt] | None,
    Field(description="height and width; None: that of the .npz file, or of [Mo]'s pictures"),
]


class AttributedDataset(Component, ABC):
    """A main task, and properties that have nothing to do with it.

    People are shared among clients, the adversary's auxiliary data and the test set, so that
    no person is in two of them; the same for the same ``seed``, whatever task, properties and
    ``held_out`` are. The train split is the clients' people; ``held_out`` says whose samples
    are the other split. Samples whose main task is unknown are left out; an unknown property
    stays, as -1. Pixels are normalized with the moments of the clients' samples.
    """

    main_task: MainTask
    properties: Annotated[
        tuple[str, ...], Field(description="attributes that samples carry as properties")
    ] = ()
    held_out: Annotated[
        Literal["test", "auxiliary"], Field(description="whose samples the test split holds")
    ] = "test"
    shares: Annotated[
        tuple[PositiveFloat, PositiveFloat, PositiveFloat],
        Field(description="of the people: clients, auxiliary, test"),
    ] = (0.6, 0.2, 0.2)
    seed: Annotated[int, Field(description="seed of who belongs to which group")] = 0

    @abstractmethod
    def table(self) -> AttributeTable:
        """All samples and attributes, read once a process."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        task = self.classes()
        if len(task) != len(set(task)) or (task == self.main_task and len(task) < 2):
            raise ValueError(
                f"main_task is the name of an attribute, or a tuple of two or more different "
                f"ones, got {self.main_task!r}"
            )
        if len(self.properties) != len(set(self.properties)):
            raise ValueError(f"properties names one twice: {self.properties}")
        if same := [name for name in self.properties if name in task]:
            raise ValueError(
                f"property {same[0]!r} is the main task {self.main_task!r} itself; choose another"
            )
        if not math.isclose(sum(self.shares), 1):
            raise ValueError(f"shares must add up to 1, got {self.shares}")
        return self

    def classes(self) -> tuple[str, ...]:
        """The attributes behind the main task."""
        return (self.main_task,) if isinstance(self.main_task, str) else self.main_task

    def task(self) -> Task:
        """Shape, classes, and moments of the clients' samples."""
        return _task(self._whole())

    def people(self, split: Split) -> Tensor:
        """Who is on each sample of a split, ``[n]`` int64."""
        return self.table().person[self._chosen(split)]

    def labels(self, split: Split) -> Tensor:
        """Labels ``[n]`` int64 of a split; a person's samples stand together."""
        return _everything(self._whole()).labels[self._chosen(split)]

    def property_values(self, split: Split) -> Mapping[str, Tensor]:
        """The properties ``[n]`` int64 of a split."""
        chosen = self._chosen(split)
        held = _everything(self._whole()).properties
        return {name: values[chosen] for name, values in held.items()}

    def load(self, split: Split, indices: Tensor | None = None) -> Samples:
        """The chosen samples of a split, all by default, with their properties and people.

        Raises:
            DatasetError: an index lies outside the split.
        """
        chosen = self._chosen(split)
        if indices is not None:
            check_indices(indices, split, len(chosen))
            chosen = chosen[indices]
        found = _everything(self._whole()).samples(chosen)
        return replace(found, people=self.table().person[chosen])

    def relations(self) -> Mapping[str, Phi]:
        """Phi of each property and the main task, over all samples that have both.

        Raises:
            DatasetError: an attribute that is not there, or a property that is no secret.
        """
        table, labels = self.table(), main_labels(self.table(), self.main_task)
        return {
            name: check_property(name, labels, table.attribute(name)) for name in self.properties
        }

    def prepare(self) -> None:
        """Fetch the data, and log how many people and samples there are, and every phi."""
        _everything(self._whole())
        log, person = getLogger("flwr"), self.table().person
        told = (
            f"{group} {len(set(person[chosen].tolist()))} people with {len(chosen)} samples"
            for group, chosen in _indices(self._whole()).items()
        )
        log.info("Main task %s: %s", " or ".join(self.classes()), ", ".join(told))
        for name, relation in self.relations().items():
            tell_relation(name, relation)

    def _chosen(self, split: Split) -> Tensor:
        """Indices of a split's samples in the table, ``[n]``."""
        return _indices(self._whole())["clients" if split == "train" else self.held_out]

    def _whole(self) -> Self:
        """What all three groups have in common, whichever is held out."""
        return self.model_copy(update={"held_out": "test"})


@cache
def _indices(source: AttributedDataset) -> Mapping[Group, Tensor]:
    """Indices into the table of each group's samples whose main task is known."""
    table = source.table()
    labels = main_labels(table, source.main_task)
    groups = split_people(table.person, source.shares, source.seed)
    chosen = {group: i[labels[i] >= 0] for group, i in groups.items()}
    for group, indices in chosen.items():
        held, needed = set(labels[indices].tolist()), 2 if group == "clients" else 1
        if len(held) < needed:
            raise DatasetError(
                f"expected {needed} or more classes of the main task {source.main_task!r} among "
                f"the {group} people, got {len(held)} in {len(indices)} samples whose class is "
                f"known; choose another main_task, seed or shares"
            )
    return chosen


@cache
def _everything(source: AttributedDataset) -> Arrays:
    """All samples of the table; refuses properties that are no secret."""
    table = source.table()
    source.relations()
    properties = {name: table.attribute(name) for name in source.properties}
    return Arrays(table.inputs, main_labels(table, source.main_task), properties)


@cache
def _task(source: AttributedDataset) -> Task:
    mean, std = moments(_everything(source).select(_indices(source)["clients"]))
    names = source.classes()
    class_names = (f"not {names[0]}", names[0]) if len(names) == 1 else names
    return Task(
        input_shape=tuple(source.table().inputs.shape[1:]),
        classes=len(class_names),
        mean=mean,
        std=tuple(value or 1.0 for value in std),
        class_names=class_names,
    )

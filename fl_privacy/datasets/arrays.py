"""What all data sources share: two splits of arrays, converted to floats only when asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.types import Samples, Task

Split = Literal["train", "test"]


class DatasetError(ValueError):
    """Data that cannot be had or read; the message says what was expected and what to do."""


@dataclass(frozen=True)
class Arrays:
    """One split as stored: ``inputs [n, *input_shape]``, ``labels [n]`` int64, properties [n].

    uint8 inputs are pixels of 0 to 255 and leave as 0 to 1; other types keep their values.
    """

    inputs: Tensor
    labels: Tensor
    properties: Mapping[str, Tensor] = field(default_factory=dict)

    def select(self, indices: Tensor) -> Arrays:
        """The chosen samples, still as stored."""
        properties = {name: values[indices] for name, values in self.properties.items()}
        return Arrays(self.inputs[indices], self.labels[indices], properties)

    def samples(self, indices: Tensor | None = None) -> Samples:
        """A copy of the chosen samples, all by default, as float32."""
        chosen = self.select(torch.arange(len(self.labels)) if indices is None else indices)
        scale = 255.0 if chosen.inputs.dtype == torch.uint8 else 1.0
        inputs = chosen.inputs.to(torch.float32, memory_format=torch.contiguous_format).div_(scale)
        return Samples(inputs, chosen.labels, chosen.properties)


def moments(arrays: Arrays) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all samples, in float64.

    Over blocks of samples, so that no float copy of a large array is made.
    """
    n, channels = arrays.inputs.shape[:2]
    total = torch.zeros(channels, dtype=torch.float64)
    squares = torch.zeros(channels, dtype=torch.float64)
    for block in torch.split(torch.arange(n), 1000):
        values = arrays.samples(block).inputs.double().reshape(len(block), channels, -1)
        total += values.mean(2).sum(0) / n
        squares += values.square().mean(2).sum(0) / n
    std = (squares - total.square()).clamp_min(0).sqrt()
    return tuple(total.tolist()), tuple(std.tolist())


def check_indices(indices: Tensor, split: Split, n: int) -> None:
    """Refuse indices that a split of ``n`` samples does not have.

    Raises:
        DatasetError: an index lies outside the split.
    """
    if not len(indices):
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= n:
        raise DatasetError(f"expected indices of the {split} split, 0..{n - 1}, got {low}..{high}")


class ArrayDataset(Component, ABC):
    """A data source that holds both splits as arrays; see `fl_privacy.protocols.Dataset`."""

    @abstractmethod
    def task(self) -> Task: ...

    @abstractmethod
    def arrays(self, split: Split) -> Arrays:
        """The stored split, read once a process."""

    def labels(self, split: Split) -> Tensor:
        """Labels ``[n]`` int64 of a split."""
        return self.arrays(split).labels

    def property_values(self, split: Split) -> Mapping[str, Tensor]:
        """The properties ``[n]`` of a split."""
        return self.arrays(split).properties

    def load(self, split: Split, indices: Tensor | None = None) -> Samples:
        """The chosen samples of a split, all by default, as float32 pixels.

        Raises:
            DatasetError: an index lies outside the split.
        """
        arrays = self.arrays(split)
        if indices is not None:
            check_indices(indices, split, len(arrays.labels))
        return arrays.samples(indices)

    def prepare(self) -> None:
        """Fetch whatever `load` will need, such as a download; before any client asks."""
        self.arrays("train")

"""The three networks of [Das], the report "Inverting Gradients" on images and power traces.

The report names the kinds of layers and gives accuracies; most widths are not in it. Those
marked (r) are reconstructions and can be set.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import initialization, output_features
from fl_privacy.types import PositiveInt, Task

Dropout = Annotated[float, Field(ge=0, lt=1, description="share dropped before the output layer")]


class DasShallow(Component):
    """Input, one ``hidden`` layer (its width is (r)) with ReLU, output: three rows of neurons.

    Takes any input, flattened.
    """

    hidden: PositiveInt = 256

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with PyTorch's default weights drawn from ``seed``."""
        with initialization(seed):
            return dense(nn.Sequential(), math.prod(task.input_shape), (self.hidden,), 0.0, task)


class DasFashionNet(Component):
    """Three dense layers, 784-256-128-10 on Fashion-MNIST (widths (r)), ReLU, dropout 0.2.

    Takes any input, flattened. A server does not know the masks of a client's dropout and
    attacks the network without it; ``dropout=0`` shows what that costs.
    """

    hidden: tuple[PositiveInt, ...] = (256, 128)
    dropout: Dropout = 0.2

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with PyTorch's default weights drawn from ``seed``."""
        width = math.prod(task.input_shape)
        with initialization(seed):
            return dense(nn.Sequential(), width, self.hidden, self.dropout, task)


class DasConvNet(Component):
    """Two convolutions, one max-pool of 2, two dense layers with dropout 0.2, the output.

    Channels 32 and 64, kernels of 3 with padding 1, ReLU and dense widths 256 and 128 are
    all (r). Takes images ``[channels, height, width]`` and signals ``[channels, length]``.
    """

    channels: tuple[PositiveInt, PositiveInt] = (32, 64)
    hidden: tuple[PositiveInt, ...] = (256, 128)
    dropout: Dropout = 0.2

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with PyTorch's default weights drawn from ``seed``.

        Raises:
            ValueError: the inputs are neither images nor signals, or a side is shorter than 2.
        """
        width, *sides = task.input_shape
        if len(sides) not in (1, 2) or min(sides) < 2:
            raise ValueError(
                f"expected [channels, height, width] or [channels, length] with sides of at least "
                f"2, got input_shape {task.input_shape}; choose another model, such as das-shallow"
            )
        convolution, pool = (
            (nn.Conv1d, nn.MaxPool1d) if len(sides) == 1 else (nn.Conv2d, nn.MaxPool2d)
        )
        with initialization(seed):
            model = nn.Sequential()
            for i, out in enumerate(self.channels, start=1):
                model.add_module(f"conv{i}", convolution(width, out, kernel_size=3, padding=1))
                model.add_module(f"relu{i}", nn.ReLU())
                width = out
            model.add_module("pool", pool(2))
            return dense(model, output_features(model, task), self.hidden, self.dropout, task)


def dense(
    model: nn.Sequential, width: int, hidden: tuple[int, ...], dropout: float, task: Task
) -> nn.Sequential:
    """``model`` with a flattening, ``hidden`` dense layers with ReLU, dropout and the output."""
    model.add_module("flatten", nn.Flatten())
    for i, out in enumerate(hidden, start=1):
        model.add_module(f"dense{i}", nn.Linear(width, out))
        model.add_module(f"dense{i}_relu", nn.ReLU())
        width = out
    if dropout:
        model.add_module("dropout", nn.Dropout(dropout))
    model.add_module("classifier", nn.Linear(width, task.classes))
    return model

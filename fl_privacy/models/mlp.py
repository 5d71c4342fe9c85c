"""A multilayer perceptron: the network whose first layer gives its input away.

Its first layer is dense with a bias, so that one sample's gradient holds the input
exactly: Geiping et al., Inverting Gradients, NeurIPS 2020, proposition 3.1,
https://arxiv.org/abs/2003.14053.
"""

from __future__ import annotations

import math

from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import initialization
from fl_privacy.types import PositiveInt, Task


class MLP(Component):
    """Flatten, dense layers of ``hidden`` widths with ReLU, a dense output layer."""

    hidden: tuple[PositiveInt, ...] = (256,)

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with PyTorch's default weights drawn from ``seed``; any input shape."""
        width = math.prod(task.input_shape)
        with initialization(seed):
            model = nn.Sequential()
            model.add_module("flatten", nn.Flatten())
            for i, hidden in enumerate(self.hidden, start=1):
                model.add_module(f"dense{i}", nn.Linear(width, hidden))
                model.add_module(f"relu{i}", nn.ReLU())
                width = hidden
            model.add_module("classifier", nn.Linear(width, task.classes))
        return model

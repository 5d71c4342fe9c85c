"""Multinomial logistic regression: the convex problem on which convergence is proved and shown.

Sun et al.: Soteria, CVPR 2021, section 6.3, https://arxiv.org/abs/2012.06043, after Li et al.:
On the Convergence of FedAvg on Non-IID Data, ICLR 2020, https://arxiv.org/abs/1907.02189.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import initialization
from fl_privacy.types import Task


class Logistic(Component):
    """Flatten and one dense layer, ``classifier``: what it sees is the normalized input itself."""

    start: Annotated[
        Literal["zeros", "random"],
        Field(description="first weights: zero, or PyTorch's default drawn from the seed"),
    ] = "zeros"

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network; any input shape. ``seed`` matters for ``start='random'`` alone."""
        with initialization(seed):
            classifier = nn.Linear(math.prod(task.input_shape), task.classes)
        if self.start == "zeros":
            for parameter in classifier.parameters():
                nn.init.zeros_(parameter)
        model = nn.Sequential()
        model.add_module("flatten", nn.Flatten())
        model.add_module("classifier", classifier)
        return model

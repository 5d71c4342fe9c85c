"""The network on which property inference was first shown.

Melis et al.: Exploiting Unintended Feature Leakage in Collaborative Learning, IEEE S&P 2019,
https://arxiv.org/abs/1805.04049. The paper names channels, kernels, pools and widths. It is
silent about padding and initial weights, which follow what the authors released (r): no
padding, weights by Glorot and Bengio, 2010 (uniform), biases zero.
"""

from __future__ import annotations

from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import image_network, initialization
from fl_privacy.types import Task


class Melis(Component):
    """3x3 convolutions of 32, 64, 128 channels, dense layers of 256 and the classes.

    Each convolution is followed by ReLU and a max-pool of 2. Layers with weights: ``conv1`` to
    ``conv3``, ``fc1``, ``fc2``.
    """

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``; takes ``[n, C, H, W]``.

        Raises:
            ValueError: the inputs are not images of 22x22 or more.
        """
        with initialization(seed):
            model = image_network(task, (32, 64, 128), pools=3, dense=(256,), padding=0)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.xavier_uniform_(parameter)
        return model

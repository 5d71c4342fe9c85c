"""LeNet as redefined for gradient matching.

Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019, https://arxiv.org/abs/1906.08935.
"""

from __future__ import annotations

from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import classified, image_shape, initialization
from fl_privacy.types import Task


class LeNetZhu(Component):
    """Four 5x5 convolutions of 12 channels, sigmoid after each, one dense layer.

    Strides 2, 2, 1, 1 and padding 2; the dense layer sees 768 features at 32x32 and 588
    at 28x28. Weights and biases are uniform in [-0.5, 0.5], as in the authors' code: with
    PyTorch's smaller default the sigmoids hardly let the input through.
    """

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``; takes ``[n, C, H, W]``.

        Raises:
            ValueError: the task's inputs are not images.
        """
        width, _, _ = image_shape(task, least=4)
        with initialization(seed):
            features = nn.Sequential()
            for i, stride in enumerate((2, 2, 1, 1), start=1):
                convolution = nn.Conv2d(width, 12, kernel_size=5, padding=2, stride=stride)
                features.add_module(f"conv{i}", convolution)
                features.add_module(f"sigmoid{i}", nn.Sigmoid())
                width = 12
            model = classified(features, task)
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        return model

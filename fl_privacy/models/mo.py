"""The three networks of [Mo], whose layers are compared for what their gradients tell.

Mo et al.: Layer-wise Characterization of Latent Information Leakage in Federated Learning,
2020, https://arxiv.org/abs/2010.08762. The paper gives channels and widths. It does not state
the padding: 1, which keeps the size of an image, is a reconstruction (r); ``padding=0`` is the
other reading. Weights are PyTorch's default, which the paper does not state either.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import dense_layers, image_network, initialization
from fl_privacy.types import PositiveInt, Task

Padding = Annotated[Literal[0, 1], Field(description="of each convolution; 1 keeps the size (r)")]


class AlexNetMo(Component):
    """AlexNet of [Mo]: 3x3 convolutions of 16, 32, 64 channels, dense layers of 256 and d_y.

    Each convolution is followed by ReLU and a max-pool of 2. Layers with weights: ``conv1`` to
    ``conv3``, ``fc1``, ``fc2`` (d_y: one output a class); the paper's "layer 4" is ``fc1``.
    """

    padding: Padding = 1

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``; takes ``[n, C, H, W]``.

        Raises:
            ValueError: the inputs are no images, or too small for the convolutions.
        """
        with initialization(seed):
            return image_network(task, (16, 32, 64), pools=3, dense=(256,), padding=self.padding)


class VGG11NetMo(Component):
    """VGG11Net of [Mo]: 3x3 convolutions of 16, 16, 16, 16, 32, 32, 64, 64 channels, three dense.

    ReLU after each, a max-pool of 2 after each of the last three; dense widths 256, 128 and the
    classes. Layers: ``conv1`` to ``conv8``, ``fc1`` (the paper's "layer 9") to ``fc3``.
    """

    padding: Padding = 1

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``; takes ``[n, C, H, W]``.

        Raises:
            ValueError: the inputs are no images, or too small for the convolutions.
        """
        channels = (16, 16, 16, 16, 32, 32, 64, 64)
        with initialization(seed):
            return image_network(task, channels, pools=3, dense=(256, 128), padding=self.padding)


class FCNetMo(Component):
    """FCNet of [Mo]: nine dense layers with ReLU in between, ``width`` wide but the last.

    ``fc1`` to ``fc9``. Takes any input, flattened: images, signals, tables.
    """

    width: Annotated[PositiveInt, Field(description="of the first eight layers")] = 32

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``."""
        with initialization(seed):
            model = nn.Sequential()
            model.add_module("flatten", nn.Flatten())
            hidden = (self.width,) * 8
            dense_layers(model, math.prod(task.input_shape), (*hidden, task.classes))
        return model

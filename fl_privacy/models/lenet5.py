"""The network of Soteria's table 1: two convolutions and three fully connected layers.

Sun et al.: Soteria, CVPR 2021, section 3.2, https://arxiv.org/abs/2012.06043. The paper says
no more than that; widths and kernels are those of LeNet-5 (LeCun et al.: Gradient-Based
Learning Applied to Document Recognition, 1998), a reconstruction.
"""

from __future__ import annotations

from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import image_shape, initialization, output_features
from fl_privacy.types import Task


class LeNet5(Component):
    """``conv1`` of 6 and ``conv2`` of 16 channels, then dense ``fc1``, ``fc2``, ``fc3``.

    Kernels of 5 without padding, each followed by ReLU and a max-pool of 2; dense widths 120,
    84 and the classes, ReLU in between. ``fc1`` sees 400 features at 32x32 and 256 at 28x28,
    ``fc2`` 120, ``fc3`` 84. Weights are PyTorch's default.
    """

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``; takes ``[n, C, H, W]``.

        Raises:
            ValueError: the task's inputs are not images of 16x16 or more.
        """
        width, _, _ = image_shape(task, least=16)
        with initialization(seed):
            model = nn.Sequential()
            for i, out in enumerate((6, 16), start=1):
                model.add_module(f"conv{i}", nn.Conv2d(width, out, kernel_size=5))
                model.add_module(f"conv{i}_relu", nn.ReLU())
                model.add_module(f"pool{i}", nn.MaxPool2d(2))
                width = out
            model.add_module("flatten", nn.Flatten())
            width = output_features(model, task)
            for i, out in enumerate((120, 84), start=1):
                model.add_module(f"fc{i}", nn.Linear(width, out))
                model.add_module(f"fc{i}_relu", nn.ReLU())
                width = out
            model.add_module("fc3", nn.Linear(width, task.classes))
        return model

"""The ConvNet on which Soteria is measured against gradient similarity.

Sun et al.: Soteria, CVPR 2021, https://arxiv.org/abs/2012.06043; the layers are those of
ConvNet with width 64 in the code of Geiping et al., https://arxiv.org/abs/2003.14053.
"""

from __future__ import annotations

from torch import nn

from fl_privacy.component import Component
from fl_privacy.models.building import classified, image_shape, initialization
from fl_privacy.types import Task

BLOCKS = ((64, 128, 128, 256, 256, 256), (256, 256))
"""Output channels of the convolutions; a max-pool of 3 ends each block."""


class ConvNet64(Component):
    """Eight 3x3 convolutions with batch norm and ReLU, two max-pools of 3, one dense layer.

    The dense layer sees 2304 features at 32x32 and at 28x28. Weights are PyTorch's default.
    """

    def build(self, task: Task, *, seed: int) -> nn.Module:
        """The network with weights drawn from ``seed``; takes ``[n, C, H, W]``.

        Raises:
            ValueError: the task's inputs are not images of 9x9 or more.
        """
        width, _, _ = image_shape(task, least=9)
        with initialization(seed):
            features = nn.Sequential()
            number = 0
            for block, channels in enumerate(BLOCKS, start=1):
                for out in channels:
                    number += 1
                    features.add_module(f"conv{number}", nn.Conv2d(width, out, 3, padding=1))
                    features.add_module(f"bn{number}", nn.BatchNorm2d(out))
                    features.add_module(f"relu{number}", nn.ReLU())
                    width = out
                features.add_module(f"pool{block}", nn.MaxPool2d(3))
            return classified(features, task)

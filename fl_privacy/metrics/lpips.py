"""How different a reconstructed image looks: LPIPS.

Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*, CVPR
2018, eq. 1, with AlexNet, as torchmetrics computes it. torchmetrics brings the linear weights;
AlexNet's own are an optional download of torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_privacy.component import Component
from fl_privacy.metrics.matching import matched_pairs
from fl_privacy.metrics.preparing import MetricError
from fl_privacy.types import Result, Samples, Task

LEAST_SIDE = 31
"""Pixels below which nothing is left after AlexNet's last pooling."""

ENLARGED = 32
"""Pixels that the shorter side of a smaller image is enlarged to."""

TOGETHER = 64
"""Images that go through the network at once."""

DOWNLOAD = (
    'python -c "from torchvision.models import AlexNet_Weights as w; w.DEFAULT.get_state_dict()"'
)


def is_picture(shape: Sequence[int]) -> bool:
    """Whether LPIPS is defined for inputs of this shape: grey or color images."""
    return len(shape) == 3 and shape[0] in (1, 3)


def lpips_each(inputs: Tensor, truth: Tensor) -> Tensor:
    """LPIPS of each pair ``[k, 1 or 3, H, W] -> [k]`` float64, pixels in [0, 1]; 0 is equal.

    Grey images are repeated to three channels. Images with a side below 31 pixels, which
    AlexNet cannot take, are enlarged (bilinear) until their shorter side has 32. NaN for
    inputs that are not images.

    Raises:
        MetricError: the weights are not here and cannot be downloaded.
    """
    if len(inputs) == 0 or not is_picture(inputs.shape[1:]):
        return torch.full((len(inputs),), torch.nan, dtype=torch.float64)
    net = network(weights_file())
    with torch.no_grad():
        parts = [
            net(suited(a), suited(b), normalize=True).flatten()
            for a, b in zip(
                torch.split(inputs, TOGETHER), torch.split(truth, TOGETHER), strict=True
            )
        ]
    return torch.cat(parts).double()


def suited(images: Tensor) -> Tensor:
    """Images as AlexNet takes them: float32, three channels, no side below 31 pixels."""
    images = images.float().expand(-1, 3, -1, -1)
    height, width = images.shape[-2:]
    shorter = min(height, width)
    if shorter >= LEAST_SIDE:
        return images
    size = (round(height * ENLARGED / shorter), round(width * ENLARGED / shorter))
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def weights_file() -> Path:
    """Where torchvision keeps AlexNet's weights: in `torch.hub`'s folder."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name


@cache
def network(file: Path) -> nn.Module:
    """The LPIPS network on the CPU; downloads AlexNet's weights to ``file`` when missing.

    The weights are read once as plain tensors before torchvision reads them, so that a
    file that holds anything else is refused; global random state stays as it is.

    Raises:
        MetricError: they are damaged, or not here and cannot be downloaded.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    try:
        torch.hub.load_state_dict_from_url(
            url, str(file.parent), check_hash=True, weights_only=True
        )
        with torch.random.fork_rng(devices=[]):
            return LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        state = "cannot be read, remove it" if file.exists() else "is missing"
        raise MetricError(
            f"lpips needs AlexNet's weights: expected {file}, which {state}, or a download of "
            f"{url} (233 MiB), got: {error}. Run once where there is a network: {DOWNLOAD}; or put "
            f"that file there by hand (TORCH_HOME moves the folder)"
        ) from None


class LPIPS(Component):
    """Learned perceptual distance, AlexNet; settings in `lpips_each`."""

    unit: ClassVar[str] = "distance of features"
    higher_is_leakier: ClassVar[bool] = False
    set_level: ClassVar[bool] = False

    def prepared(self, dataset: str, task: Task) -> LPIPS:
        """Itself, once the network is loaded, which inputs that are not images do not need.

        Raises:
            MetricError: the weights are not here and cannot be downloaded.
        """
        if is_picture(task.input_shape):
            network(weights_file())
        return self

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value for each result, ``[results]`` float64; NaN where it is not defined."""
        pairs = matched_pairs(results, truths, "lpips")
        return torch.tensor(
            [float(lpips_each(*pair).mean()) for pair in pairs], dtype=torch.float64
        )

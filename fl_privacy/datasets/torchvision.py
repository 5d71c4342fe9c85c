"""MNIST, Fashion-MNIST and CIFAR-10 as published, fetched by torchvision.

LeCun et al., 1998, https://doi.org/10.1109/5.726791; Xiao et al., 2017,
https://arxiv.org/abs/1708.07747; Krizhevsky, 2009, Learning Multiple Layers of Features from
Tiny Images. torchvision checks the published MD5 sums of what it downloads (and of CIFAR-10's
files each time it reads them). Moments are those of all pixels of the published training split.
torchvision is imported when data is read, since that takes a second.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
from filelock import FileLock
from pydantic import AfterValidator

from fl_privacy.datasets.arrays import ArrayDataset, Arrays, DatasetError, Split
from fl_privacy.datasets.embedded import FASHION_MNIST_TASK
from fl_privacy.types import Task

MNIST_TASK = Task(input_shape=(1, 28, 28), classes=10, mean=(0.13066,), std=(0.30811,))
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_TASK = Task(
    input_shape=(3, 32, 32),
    classes=10,
    mean=(0.49140, 0.48216, 0.44653),
    std=(0.24703, 0.24349, 0.26159),
    class_names=CIFAR10_CLASSES,
)
FILES: Mapping[str, str] = {
    "MNIST": "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
    "FashionMNIST": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
    "CIFAR10": "cifar-10-python.tar.gz",
}
"""Where torchvision looks, below the data folder, before it downloads."""


def _absolute(folder: str) -> str:
    if folder and not Path(folder).is_absolute():
        raise ValueError("expected an absolute folder, or nothing for the default one")
    return folder


Folder = Annotated[str, AfterValidator(_absolute)]
"""Data folder; empty: ``$FL_PRIVACY_DATA``, else ``~/.cache/fl-privacy/data``."""


class MNIST(ArrayDataset):
    """60,000 training and 10,000 test images of handwritten digits, 28x28, grey."""

    folder: Folder = ""

    def task(self) -> Task:
        """Ten digits."""
        return MNIST_TASK

    def arrays(self, split: Split) -> Arrays:
        """uint8 ``[n, 1, 28, 28]``; downloads when missing."""
        return _read("MNIST", data_folder(self.folder), split)


class FashionMNIST(ArrayDataset):
    """60,000 training and 10,000 test images of garments, 28x28, grey."""

    folder: Folder = ""

    def task(self) -> Task:
        """Ten kinds of garment."""
        return FASHION_MNIST_TASK

    def arrays(self, split: Split) -> Arrays:
        """uint8 ``[n, 1, 28, 28]``; downloads when missing."""
        return _read("FashionMNIST", data_folder(self.folder), split)


class CIFAR10(ArrayDataset):
    """50,000 training and 10,000 test photographs, 32x32, color."""

    folder: Folder = ""

    def task(self) -> Task:
        """Ten kinds of animals and vehicles."""
        return CIFAR10_TASK

    def arrays(self, split: Split) -> Arrays:
        """uint8 ``[n, 3, 32, 32]``; downloads when missing."""
        return _read("CIFAR10", data_folder(self.folder), split)


def data_folder(folder: str) -> Path:
    """The folder asked for, or the default one."""
    default = Path.home() / ".cache" / "fl-privacy" / "data"
    return Path(folder or os.environ.get("FL_PRIVACY_DATA") or default).absolute()


@cache
def _read(name: str, folder: Path, split: Split) -> Arrays:
    """Read a split; the first of several processes downloads, the others wait for it."""
    from torchvision import datasets as published

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            source = getattr(published, name)(folder, train=split == "train", download=True)
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
        raise DatasetError(
            f"cannot have {name}: expected {FILES[name]} in {folder}, or a download of it. "
            f"Put the published files there by hand (removing damaged ones), or set folder or "
            f"FL_PRIVACY_DATA. Tried and got: {error}"
        ) from error
    inputs = torch.as_tensor(source.data)
    inputs = inputs.unsqueeze(1) if inputs.ndim == 3 else inputs.permute(0, 3, 1, 2).contiguous()
    return Arrays(inputs, torch.as_tensor(source.targets, dtype=torch.int64))

"""A Fashion-MNIST subset that travels with the package and in a Flower app bundle.

Xiao, Rasul, Vollgraf: Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747; MIT license, see
FASHION_MNIST_LICENSE.md. Made by ``docs/make_fashion_mini.py``.
"""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fl_privacy.datasets.arrays import ArrayDataset, Arrays, Split
from fl_privacy.types import Task

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_TASK = Task(
    input_shape=(1, 28, 28),
    classes=10,
    mean=(0.28604,),
    std=(0.35302,),
    class_names=CLASSES,
)
"""Mean and standard deviation over all pixels of the 60,000 published training images."""


class _Record(TypedDict):
    """One PNG sheet a class: ``columns`` images of ``side`` x ``side`` a row."""

    columns: int
    side: int
    indices: list[list[int]]
    sheets: list[str]


class FashionMini(ArrayDataset):
    """2,400 training and 600 test images of Fashion-MNIST, 28x28, grey, balanced.

    Drawn without replacement from the published splits with NumPy's ``default_rng(2017)``;
    stored class by class (partitions shuffle).
    """

    def task(self) -> Task:
        """Ten kinds of garment; moments of the complete training split."""
        return FASHION_MNIST_TASK

    def arrays(self, split: Split) -> Arrays:
        """uint8 ``[n, 1, 28, 28]``."""
        return _read(split)

    def published_indices(self, split: Split) -> Tensor:
        """Where each image stands in the published split, ``[n]``."""
        return torch.tensor(_record(split)["indices"]).flatten()


@cache
def _read(split: Split) -> Arrays:
    record = _record(split)
    classes = [_cut(sheet, record["columns"], record["side"]) for sheet in record["sheets"]]
    labels = torch.arange(len(classes)).repeat_interleave(len(classes[0]))
    return Arrays(torch.cat(classes).unsqueeze(1), labels)


def _record(split: Split) -> _Record:
    text = (Path(__file__).parent / f"fashion_mini_{split}.json").read_text()
    record: _Record = json.loads(text)
    return record


def _cut(sheet: str, columns: int, side: int) -> Tensor:
    """Images ``[n, side, side]`` uint8 from a base64 PNG that holds them row by row."""
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(sheet))))
    grid = torch.from_numpy(pixels).reshape(-1, side, columns, side)
    return grid.transpose(1, 2).reshape(-1, side, side)

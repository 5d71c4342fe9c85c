"""The 8x8 digits that come with scikit-learn: nothing to download.

Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998,
https://doi.org/10.24432/C50P49 (its test part, as `sklearn.datasets.load_digits` has it).
"""

from __future__ import annotations

from functools import cache

import torch

from fl_privacy.datasets.arrays import ArrayDataset, Arrays, Split, moments
from fl_privacy.types import Task

TEST_IMAGES = 360


class Digits(ArrayDataset):
    """1,437 training and 360 test images, 8x8, 17 grey levels as 0 to 1.

    scikit-learn publishes no split: this one is stratified by class, seed 0.
    """

    def task(self) -> Task:
        """Ten digits; moments computed from the training split."""
        return _task()

    def arrays(self, split: Split) -> Arrays:
        """float32 ``[n, 1, 8, 8]``."""
        return _read()[split]


@cache
def _task() -> Task:
    mean, std = moments(_read()["train"])
    return Task(input_shape=(1, 8, 8), classes=10, mean=mean, std=std)


@cache
def _read() -> dict[Split, Arrays]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=TEST_IMAGES, random_state=0, stratify=labels
    )
    parts: dict[Split, tuple[object, object]] = {
        "train": (x_train, y_train),
        "test": (x_test, y_test),
    }
    return {
        split: Arrays(
            torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
            torch.as_tensor(y, dtype=torch.int64),
        )
        for split, (x, y) in parts.items()
    }

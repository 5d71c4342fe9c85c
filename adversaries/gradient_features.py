"""What a property classifier sees of a gradient: Melis et al., section 4 and their code.

Melis et al.: Exploiting Unintended Feature Leakage in Collaborative Learning, S&P 2019,
https://arxiv.org/abs/1805.04049.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fl_privacy.layers import weight_of
from fl_privacy.types import Tensors

DENSE_ENTRIES = 5000
"""Entries above which a dense matrix is pooled over its input axis."""

Family = Literal["forest", "logistic", "mlp"]

Rows = np.ndarray[Any, np.dtype[Any]]


class Classifier(Protocol):
    """What is used of a scikit-learn classifier."""

    def fit(self, rows: Rows, truth: Rows) -> Classifier: ...

    def predict_proba(self, rows: Rows) -> Rows: ...


def pooled(gradient: Tensor) -> Tensor:
    """Features of the gradients of one weight, ``[n, out, in, *kernel]`` -> ``[n, features]``.

    Absolute values; of each kernel the largest; of a dense matrix of more than
    `DENSE_ENTRIES` entries the largest of each row, which is the largest over its inputs.
    """
    size = gradient.abs()
    if size.ndim > 3:
        size = size.flatten(3).amax(3)
    elif size[0].numel() > DENSE_ENTRIES:
        size = size.amax(2)
    return size.flatten(1)


def features(gradients: Tensors, layers: Sequence[str]) -> dict[str, Tensor]:
    """Layer -> its `pooled` weight gradients ``[n, features]``; biases tell nothing here.

    ``gradients`` hold tensors ``[n, *parameter shape]``.
    """
    return {layer: pooled(gradients[weight_of(layer)]) for layer in layers}


def joined(found: Tensors, layers: Sequence[str]) -> Tensor:
    """The features of ``layers`` side by side, ``[n, features]`` float32."""
    return torch.cat([found[layer] for layer in layers], dim=1).float()


def forest(trees: int, seed: int) -> Classifier:
    """A random forest with the leaves of [Melis]: 5 samples in a leaf, 5 to split."""
    from sklearn.ensemble import RandomForestClassifier

    made: Classifier = RandomForestClassifier(
        trees, min_samples_leaf=5, min_samples_split=5, random_state=seed % 2**32
    )
    return made


def classifier(family: Family, seed: int) -> Classifier:
    """A classifier that scales each row to length 1 and standardizes as its training rows.

    The forest is that of [Melis], of 100 trees; logistic
    regression and the perceptron (one hidden layer of 64) have scikit-learn's L2 penalties.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    made = {
        "forest": forest(100, seed),
        "logistic": LogisticRegression(max_iter=1000),
        "mlp": MLPClassifier(hidden_layer_sizes=(64,), max_iter=1000, random_state=seed % 2**32),
    }
    made_of: Classifier = make_pipeline(Normalizer(), StandardScaler(), made[family])
    return made_of

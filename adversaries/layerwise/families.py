"""Predictive families of usable information: who is assumed to read a gradient.

Xu et al.: A Theory of Usable Information under Computational Constraints, ICLR 2020,
https://arxiv.org/abs/2002.10689, definition 1. All are scikit-learn's; a family is one
classifier, or several that differ in how much they are held back, of which inner folds choose.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adversaries.gradient_features import Classifier, Family, forest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Classifiers = Callable[[int], list[Classifier]]
"""A seed to fresh scikit-learn classifiers."""


def families(trees: int) -> Mapping[Family, Classifiers]:
    """The families by name; ``trees`` in the forest."""
    return {"forest": lambda seed: [forest(trees, seed)], "logistic": logistic, "mlp": mlp}


def logistic(_seed: int) -> list[Classifier]:
    """Logistic regression on standardized features, under three L2 penalties."""
    from sklearn.linear_model import LogisticRegression

    return [rotated(LogisticRegression(C=c, max_iter=1000)) for c in (1.0, 1e-2, 1e-4)]


def mlp(seed: int) -> list[Classifier]:
    """One hidden layer of 32 on standardized features, under two weight decays, by L-BFGS."""
    from sklearn.neural_network import MLPClassifier

    state = seed % 2**32
    return [
        rotated(MLPClassifier((32,), solver="lbfgs", alpha=a, max_iter=100, random_state=state))
        for a in (1.0, 100.0)
    ]


def rotated(classifier: Any) -> Classifier:
    """``classifier`` on standardized features in the coordinates of the training samples' span.

    The rotation costs a penalized linear model nothing, as its weights lie in that span, and
    makes a layer of 100,000 features as cheap as one of as many features as there are samples.
    """
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made: Classifier = make_pipeline(StandardScaler(), PCA(svd_solver="full"), classifier)
    return made


def fitted(classifier: Classifier, features: Floats, labels: Ints) -> Classifier:
    """``classifier`` fitted in place, in silence about what is no fault.

    That an MLP stops at its last iteration is part of it, and features may all be constant.
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(features, labels)


def probability(classifier: Classifier, features: Floats) -> Floats:
    """Probability of label 1, ``[n]``; that of a forest from smoothed leaves."""
    from sklearn.ensemble import RandomForestClassifier

    if isinstance(classifier, RandomForestClassifier):
        return smoothed(classifier, features)
    return np.asarray(classifier.predict_proba(features)[:, 1], dtype=np.float64)


def smoothed(forest: Any, features: Floats) -> Floats:
    """Mean over trees of ``(ones + 1) / (samples + 2)`` in the leaf: Laplace's rule.

    A plain forest may give a probability of zero, which costs an infinite number of nats.
    """
    inputs = features.astype(np.float32)  # what trees compare in
    total = np.zeros(len(features))
    for one in forest.estimators_:
        tree = one.tree_
        leaves = tree.apply(inputs)
        samples = tree.weighted_n_node_samples[leaves]
        total += (tree.value[leaves, 0, 1] * samples + 1) / (samples + 2)
    return total / len(forest.estimators_)

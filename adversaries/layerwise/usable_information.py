"""Empirical V-information on held-out data, as a function of features, labels and groups.

Mo et al.: Layer-wise Characterization of Latent Information Leakage in Federated Learning,
eq. (1), https://arxiv.org/abs/2010.08762; Xu et al.: A Theory of Usable Information under
Computational Constraints, ICLR 2020, https://arxiv.org/abs/2002.10689.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from adversaries.layerwise.families import Classifiers, Floats, Ints, fitted, probability
from fl_privacy.layers import LayerMetricError
from fl_privacy.seeding import derive_seed

SLOPES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Factors on the log-odds that calibration tries."""

WEIGHTS = np.linspace(0, 0.98, 50)
"""Weights of the prediction that are tried in its mixture with the prevalence."""


@dataclass(frozen=True)
class UsableInformation:
    """What a family can tell of a label from features, in nats.

    ``value`` is the mean over all held-out samples, with its sign; ``folds`` that of each group;
    ``ceiling`` the entropy of the label when nothing is seen, ``H_V(p | nothing)``.
    """

    value: float
    folds: Floats
    ceiling: float

    @property
    def standard_error(self) -> float:
        """Of the mean over folds; these share training data, so it is no interval's."""
        return float(self.folds.std(ddof=1) / math.sqrt(len(self.folds)))


def usable_information(
    features: Floats, labels: Ints, groups: Ints, classifiers: Classifiers, *, seed: int
) -> UsableInformation:
    """``H_V(p | nothing) - H_V(p | features)``, each group predicted from the others.

    The first term is the log-loss of the prevalence among the training samples. For the second
    the family may ignore its input: the prediction is ``w q + (1 - w) prevalence``, where ``q``
    is calibrated (its log-odds, from those of the prevalence on, times a factor). Which
    classifier, factor and ``w`` are chosen by folds inside the training groups. The definition
    takes a supremum over the family and the true distribution; this is what one fit reaches on
    other data, so its expectation lies below it, and it can be negative.

    Args:
        features: ``[n, d]``.
        labels: ``[n]``, 0 or 1.
        groups: ``[n]``, whatever must not be in training and test at once; three or more.
        classifiers: the family, see `families`.
        seed: of classifiers that draw.

    Raises:
        LayerMetricError: fewer than three groups, or labels of one value outside two of them.
    """
    names = check_groups(labels, groups)

    def predictions(*apart: int) -> Floats:
        """``[classifiers, n]`` by classifiers that were not shown the groups ``apart``."""
        train = ~np.isin(groups, apart)
        made = classifiers(derive_seed(seed, "v-information", *apart))
        found = [fitted(c, features[train], labels[train]) for c in made]
        return np.stack([probability(c, features) for c in found])

    # who was shown neither the group f nor g predicts g inside the fold f, and f inside g
    inner = {frozenset(pair): predictions(*pair) for pair in combinations(names, 2)}
    gains, nothing = np.empty(len(labels)), np.empty(len(labels))
    for name in names:
        test, train = groups == name, groups != name
        rows, prior = of_inner_folds(inner, labels, groups, name)
        mistakes = len(names) - 1
        chosen, slope, weight = tuned(rows[:, train], labels[train], prior[train], mistakes)
        prevalence = np.full(test.sum(), labels[train].mean())
        q = calibrated(predictions(name)[chosen, test], prevalence, slope)
        nothing[test] = -log_likelihood(prevalence, labels[test])
        gains[test] = nothing[test] + log_likelihood(mixed(q, prevalence, weight), labels[test])
    folds = np.asarray([gains[groups == name].mean() for name in names])
    return UsableInformation(float(gains.mean()), folds, float(nothing.mean()))


def of_inner_folds(
    inner: Mapping[frozenset[int], Floats], labels: Ints, groups: Ints, name: int
) -> tuple[Floats, Floats]:
    """What each classifier predicts, and the prevalence it saw, with neither ``name`` shown nor
    the sample's own group: ``[classifiers, n]`` and ``[n]``, NaN in the group ``name`` itself.
    """
    rows = np.full_like(next(iter(inner.values())), math.nan)
    prior = np.full(len(labels), math.nan)
    for pair, predicted in inner.items():
        if name in pair:
            at = np.isin(groups, list(pair - {name}))
            rows[:, at] = predicted[:, at]
            prior[at] = labels[~np.isin(groups, list(pair))].mean()
    return rows, prior


def check_groups(labels: Ints, groups: Ints) -> list[int]:
    """The groups, which can be predicted from one another.

    Raises:
        LayerMetricError: fewer than three, or one value of the label outside two of them.
    """
    names: list[int] = np.unique(groups).tolist()
    if len(names) < 3:
        raise LayerMetricError(
            f"expected three or more groups, one to test on, one to calibrate on and one to "
            f"train on, got {len(names)}"
        )
    for pair in combinations(names, 2):
        if len(np.unique(labels[~np.isin(groups, pair)])) != 2:
            raise LayerMetricError(
                f"expected labels 0 and 1 outside every two groups, got one value outside {pair}"
            )
    return names


def tuned(
    predicted: Floats, labels: Ints, prior: Floats, mistakes: int
) -> tuple[int, float, float]:
    """Classifier, factor on the log-odds, and weight beside the prior, of the best likelihood.

    ``predicted [classifiers, n]``, ``prior [n]``. To the samples are added so many imagined
    ``mistakes``, of which the prediction was certain: few groups without a mistake are no
    promise that there will be none, and one at full weight would cost everything. The
    smallest weight among equals.
    """
    imagined = mistakes * np.log1p(-WEIGHTS)
    best = (-math.inf, 0, 1.0, 0.0)
    for chosen, q in enumerate(predicted):
        for slope in SLOPES:
            tried = mixed(calibrated(q, prior, slope), prior, WEIGHTS[:, None])
            likelihoods = log_likelihood(tried, labels).sum(1) + imagined
            i = int(likelihoods.argmax())
            if likelihoods[i] > best[0]:
                best = (float(likelihoods[i]), chosen, slope, float(WEIGHTS[i]))
    return best[1:]


def calibrated(predicted: Floats, prior: Floats, slope: float) -> Floats:
    """Probabilities whose log-odds stand ``slope`` times as far from those of the prior."""
    odds = log_odds(prior) + slope * (log_odds(predicted) - log_odds(prior))
    calm: Floats = 0.5 * (1 + np.tanh(0.5 * odds))
    return calm


def mixed(predicted: Floats, prior: Floats, weight: float | Floats) -> Floats:
    """``weight`` times the prediction, and the prior for the rest."""
    together: Floats = weight * predicted + (1 - weight) * prior
    return together


def log_odds(p: Floats) -> Floats:
    """``log(p / (1 - p))``, at most 30 in size."""
    inside = np.clip(p, 1e-13, 1 - 1e-13)
    odds: Floats = np.log(inside) - np.log1p(-inside)
    return odds


def log_likelihood(p: Floats, labels: Ints) -> Floats:
    """Logarithm of the probability that was given to the label, ``[..., n]``."""
    found: Floats = np.log(np.clip(np.where(labels == 1, p, 1 - p), 1e-13, None))
    return found


def in_sample_information(
    features: Floats, labels: Ints, classifiers: Classifiers, *, seed: int
) -> float:
    """Eq. (1) of [Mo] to the letter: fitted and evaluated on the same samples, in nats.

    It cannot tell noise from signal: a random forest reaches about 0.34 of ln 2 = 0.69 on noise.
    """
    model = fitted(classifiers(derive_seed(seed, "in-sample"))[0], features, labels)
    prevalence = np.full(len(labels), labels.mean())
    predicted = np.asarray(model.predict_proba(features)[:, 1], dtype=np.float64)
    return float((log_likelihood(predicted, labels) - log_likelihood(prevalence, labels)).mean())

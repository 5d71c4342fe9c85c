"""V-information against theory: analytic values, noise, what a family cannot see, and traps."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.ensemble import RandomForestClassifier

from adversaries.gradient_features import Family
from adversaries.layerwise.families import Floats, Ints, families, probability
from adversaries.layerwise.usable_information import (
    WEIGHTS,
    calibrated,
    in_sample_information,
    tuned,
    usable_information,
)
from fl_privacy.layers import LayerMetricError

FAMILIES = families(10)
LN2 = math.log(2)


def balanced(n: int, groups: int) -> tuple[Ints, Ints]:
    """Labels in turn, and groups of equal size."""
    return np.arange(n) % 2, np.arange(n) * groups // n


def permuted(labels: Ints, seed: int) -> Ints:
    """The labels shuffled within the three groups that they stand in."""
    return np.random.default_rng(seed).permuted(labels.reshape(3, -1), axis=1).flatten()


def gaussian_information(apart: float) -> tuple[float, float]:
    """Mean and deviation of the information that x ~ N(+-apart / 2, 1) gives of its sign."""

    def moment(power: int) -> float:
        def density(x: float) -> float:
            told = LN2 - np.log1p(math.exp(-apart * x))
            return float(norm.pdf(x - apart / 2) * told**power)

        return float(quad(density, -12, 12)[0])

    mean = moment(1)
    return mean, math.sqrt(moment(2) - mean**2)


@pytest.mark.parametrize("apart", [1.0, 3.0])
def test_a_gaussian_has_its_analytic_information(apart: float) -> None:
    n = 2000
    labels, groups = balanced(n, 5)
    features = np.random.default_rng(0).normal(size=(n, 1)) + apart * (labels[:, None] - 0.5)
    found = usable_information(features, labels, groups, FAMILIES["logistic"], seed=0)
    wanted, deviation = gaussian_information(apart)
    assert abs(found.value - wanted) < 3 * deviation / math.sqrt(n)
    assert found.ceiling == pytest.approx(LN2)
    assert found.folds.mean() == pytest.approx(found.value)
    assert 0 < found.standard_error < 5 * deviation / math.sqrt(n)


@pytest.mark.parametrize("family", ["forest", "logistic", "mlp"])
def test_noise_is_within_its_null_and_in_sample_far_above(family: Family) -> None:
    labels, groups = balanced(120, 3)
    features = np.random.default_rng(1).normal(size=(120, 40))

    def value(y: Ints) -> float:
        return usable_information(features, y, groups, FAMILIES[family], seed=0).value

    null = [value(permuted(labels, seed)) for seed in range(2)]
    spread = max(0.02, *map(abs, null))
    assert abs(value(labels)) < 2 * spread < 0.1
    # the trap of eq. (1): a linear model of d features gains about d / 2n nats from noise alone
    literal = in_sample_information(features, labels, FAMILIES[family], seed=0)
    assert literal > 0.1


def test_a_family_tells_what_it_can_see() -> None:
    labels, groups = balanced(240, 4)
    features = np.random.default_rng(2).normal(size=(240, 2))
    features[:, 0] = np.abs(features[:, 0]) * np.sign(features[:, 1]) * (2 * labels - 1)
    forest = usable_information(features, labels, groups, FAMILIES["forest"], seed=0).value
    linear = usable_information(features, labels, groups, FAMILIES["logistic"], seed=0).value
    assert forest > 0.2
    assert abs(linear) < 0.05


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_features_that_say_nothing_give_exactly_nothing(share: float) -> None:
    groups = np.arange(80) // 20
    labels = (np.arange(80) % 20 < 20 * share).astype(np.int64)
    features = np.ones((80, 3))
    found = usable_information(features, labels, groups, FAMILIES["logistic"], seed=0)
    assert found.value == 0
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.ceiling == pytest.approx(entropy)


def test_what_tells_within_a_group_alone_is_not_counted() -> None:
    draw = np.random.default_rng(3)
    labels, groups = balanced(160, 4)
    centers = 5 * draw.normal(size=(4, 2, 10))
    features = centers[groups, labels] + draw.normal(size=(160, 10))
    apart = usable_information(features, labels, groups, FAMILIES["logistic"], seed=0).value
    mixed = draw.permutation(groups)
    together = usable_information(features, labels, mixed, FAMILIES["logistic"], seed=0).value
    assert together > 0.4
    assert apart < 0.1


def test_certainty_that_turns_out_wrong_costs_a_bounded_number_of_nats() -> None:
    labels, groups = balanced(200, 5)
    sign = np.where(groups == 4, -1, 1) * (2 * labels - 1)
    features = sign[:, None] + 0.01 * np.random.default_rng(4).normal(size=(200, 1))
    found = usable_information(features, labels, groups, FAMILIES["logistic"], seed=0)
    assert found.folds[4] < 0
    assert found.folds.min() > math.log(1 - WEIGHTS[-1])


def test_without_a_mistake_the_weight_is_that_of_the_imagined_ones() -> None:
    labels = np.arange(128) % 2
    certain, prior = labels[None].astype(float), np.full(128, 0.5)
    for mistakes in (4, 32):
        *_, weight = tuned(certain, labels, prior, mistakes)
        # where n log((1 + w) / 2) + m log(1 - w) is largest
        best = (128 - mistakes) / (128 + mistakes)
        assert weight == pytest.approx(best, abs=WEIGHTS[1])


def test_calibration_scales_log_odds_from_those_of_the_prior_on() -> None:
    q, prior = np.array([0.1, 0.5, 0.8]), np.full(3, 0.3)
    assert calibrated(q, prior, 1.0) == pytest.approx(q)
    assert calibrated(q, prior, 0.0) == pytest.approx(prior)
    assert calibrated(prior, prior, 8.0) == pytest.approx(prior)
    doubled = (q / (1 - q)) ** 2 / (prior / (1 - prior))
    assert calibrated(q, prior, 2.0) == pytest.approx(doubled / (1 + doubled))


def test_a_forest_smooths_its_leaves_by_laplaces_rule() -> None:
    draw = np.random.default_rng(5)
    features, labels = draw.normal(size=(60, 3)), draw.integers(0, 2, 60)
    forest = RandomForestClassifier(1, min_samples_leaf=3, bootstrap=False, random_state=0)
    forest.fit(features, labels)
    leaves = forest.apply(features)[:, 0]
    wanted = [(labels[leaves == i].sum() + 1) / ((leaves == i).sum() + 2) for i in leaves]
    assert probability(forest, features) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("labels", "groups", "reason"),
    [
        (np.arange(20) % 2, np.arange(20) // 10, "three or more groups.* got 2"),
        ((np.arange(30) < 10).astype(np.int64), np.arange(30) // 10, "one value outside"),
    ],
)
def test_groups_that_cannot_predict_each_other_are_refused(
    labels: Ints, groups: Ints, reason: str
) -> None:
    features: Floats = np.zeros((len(labels), 1))
    with pytest.raises(LayerMetricError, match=reason):
        usable_information(features, labels, groups, FAMILIES["logistic"], seed=0)

"""Distances between subspaces against SciPy and against planted angles, and the metric's nulls."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from adversaries.layerwise import subspaces
from adversaries.layerwise.subspace import SubspaceDistance, compared
from adversaries.layerwise.subspaces import distance, small_factor
from fl_privacy.layers import LayerMetricError
from fl_privacy.seeding import generator
from fl_privacy.testing import check_layer_metric
from fl_privacy.testing.toys import toy_observations, toy_samples
from fl_privacy.types import Samples

CPU = torch.device("cpu")
METRIC = SubspaceDistance(n=4, k=2, batch_size=2, permutations=9)


def bright(shift: float, seed: int = 0) -> Samples:
    """Half of the samples of each label have the property, and pixels brighter by ``shift``."""
    samples, has = toy_samples(64, seed), (torch.arange(64) // 4) % 2
    inputs = samples.inputs + shift * has.view(-1, 1, 1, 1)
    return replace(samples, inputs=inputs, properties={"property": has})


def test_angles_of_small_factors_are_those_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspaces, "ROWS", 70)  # blocks, the last of which is not whole
    draw = np.random.default_rng(0)
    columns = draw.normal(size=(500, 12)) * np.arange(1, 13)
    r = small_factor(list(torch.from_numpy(columns.T).float()))
    assert r.shape == (12, 12)
    assert r.T @ r == pytest.approx(columns.T @ columns, rel=1e-5)
    left = [np.linalg.svd(part)[0][:, :3] for part in (columns[:, :6], columns[:, 6:])]
    angles = scipy.linalg.subspace_angles(*left)
    found = distance(r[:, :6], r[:, 6:], 3)
    assert found.geodesic == pytest.approx(
        np.linalg.norm(angles) / (math.sqrt(3) * math.pi / 2), rel=1e-5
    )
    assert found.chordal == pytest.approx(np.linalg.norm(np.sin(angles)) / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("angles", [(0.0, 0.0), (1e-6, 1e-6), (0.3, 1.1), (math.pi / 2,) * 2])
def test_planted_angles_are_found(angles: tuple[float, float]) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 4)))
    cosines, sines = np.cos(angles), np.sin(angles)
    turned = q[:, :2] * cosines + q[:, 2:] * sines
    mixing = np.random.default_rng(2).normal(size=(2, 5))
    found = distance(q[:, :2] @ mixing, turned @ mixing, 2)
    wanted = np.linalg.norm(angles) / (math.sqrt(2) * math.pi / 2)
    assert found.geodesic == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert found.chordal == pytest.approx(np.linalg.norm(sines) / math.sqrt(2), abs=1e-9)


def test_the_distance_is_symmetric_and_blind_to_rotations_of_the_space() -> None:
    draw = np.random.default_rng(3)
    one, other = draw.normal(size=(20, 6)), draw.normal(size=(20, 6))
    rotation, _ = np.linalg.qr(draw.normal(size=(20, 20)))
    assert distance(one, other, 3) == pytest.approx(distance(other, one, 3))
    assert distance(one, other, 3) == pytest.approx(distance(rotation @ one, rotation @ other, 3))


def test_a_subspace_that_is_not_there_has_no_distance() -> None:
    full, flat = np.eye(6)[:, :3], np.outer(np.ones(6), np.arange(3))
    for one, other in ((full, flat), (flat, full), (full, np.zeros((6, 3)))):
        assert all(math.isnan(value) for value in distance(one, other, 2))


def test_random_subspaces_are_nearly_orthogonal_hence_the_nulls() -> None:
    draw = np.random.default_rng(4)
    found = distance(draw.normal(size=(5000, 8)), draw.normal(size=(5000, 8)), 4)
    assert found.geodesic > 0.9


def test_kinds_are_compared_between_halves_of_people_and_so_are_samples_of_one_kind() -> None:
    """Columns of each half and kind span a plane of their own, which two of them may share."""
    e = np.eye(8)
    one_with, one_without, other_with = e[:, :2], e[:, 2:4], e[:, 4:6]
    columns = np.concatenate([one_with, one_without, other_with, one_with], axis=1)
    assert [d.geodesic for d in compared(columns, 2)] == pytest.approx([0, 1, 1, 1])
    columns = np.concatenate([one_with, one_without, one_with, other_with], axis=1)
    assert [d.geodesic for d in compared(columns, 2)] == pytest.approx([1, 1, 0, 1])
    columns = np.concatenate([one_with, one_without, one_without, one_without], axis=1)
    assert [d.geodesic for d in compared(columns, 2)] == pytest.approx([1, 0, 1, 0])


def test_it_keeps_the_contract() -> None:
    check_layer_metric(SubspaceDistance(n=4, k=2, permutations=2))


def test_a_property_that_turns_gradients_stands_above_its_null() -> None:
    observations, _ = toy_observations(2)
    found = METRIC.measure(observations, bright(3.0), seed=0, device=CPU)
    assert found.layers == ("1", "3")
    assert found.n == 16
    null = found.columns["null, largest of 9"]
    assert (found.values > null).all()
    assert (found.values > found.columns["within, geodesic"]).all()
    assert ((found.values >= 0) & (found.values <= 1)).all()


def test_a_property_that_means_nothing_is_within_its_null() -> None:
    observations, _ = toy_observations(2)
    above = [
        METRIC.measure(observations, bright(0.0, seed), seed=seed, device=CPU) for seed in range(4)
    ]
    exceeding = [m.values > m.columns["null, largest of 9"] for m in above]
    # each with probability 1/10 if nothing depends on the property
    assert int(torch.stack(exceeding).sum()) <= 3
    means = torch.stack([m.values - m.columns["null"] for m in above]).mean(0)
    assert (means.abs() < 0.1).all()


def of_people(seed: int) -> Samples:
    """Sixteen people, half of whom have a property that means nothing, eight pictures of each."""
    draw, people = generator(seed, "people"), torch.arange(128) // 8
    looks = torch.randn(16, 1, 6, 6, generator=draw)[people]
    has = (torch.randperm(16, generator=draw) % 2)[people]
    samples = toy_samples(128, seed)
    return replace(
        samples, inputs=samples.inputs + 2 * looks, properties={"property": has}, people=people
    )


def test_people_are_not_taken_for_their_property() -> None:
    observations, _ = toy_observations(1)
    metric = SubspaceDistance(n=4, k=2, batch_size=4, permutations=3, layers=("1",))
    above = 0
    for seed in range(10):
        found = metric.measure(observations, of_people(seed), seed=seed, device=CPU)
        above += int(found.values > found.columns["null, largest of 3"])
    assert above <= 6  # 2.5 are expected, 1.4 their deviation; 10 where people are not known
    assert found.columns["people with it"].tolist() == [8]
    assert found.columns["samples without it"].tolist() == [32]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 9, "batch_size": 4}, "expected 72 or more in all folds, got 32.* or n"),
        ({"layers": ("3", "head")}, "no layer 'head' .*; layers: 1, 3"),
        ({"property": "smiling"}, "no property 'smiling' .* one of property"),
        ({"n": 80, "k": 80, "batch_size": 1}, "layer 3 has 64 weights"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, object], reason: str) -> None:
    observations, _ = toy_observations(1)
    metric = SubspaceDistance(**{**METRIC.model_dump(), **changes})
    with pytest.raises(LayerMetricError, match=reason):
        metric.measure(observations, bright(0.0), seed=0, device=CPU)


def test_more_directions_than_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be n = 4 or less"):
        SubspaceDistance(n=4, k=5)

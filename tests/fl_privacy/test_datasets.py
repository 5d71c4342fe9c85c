"""Embedded data: counts, balance, range, and equality with what was published."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_privacy.component import create
from fl_privacy.datasets.arrays import ArrayDataset, Arrays, DatasetError, Split, moments
from fl_privacy.datasets.digits import Digits
from fl_privacy.datasets.embedded import FashionMini
from fl_privacy.protocols import Dataset

SPLITS: tuple[Split, ...] = ("train", "test")


@pytest.mark.parametrize("name", ["fashion-mini", "digits"])
def test_samples_are_pixels_of_the_task(name: str) -> None:
    dataset = create("datasets", name)
    assert isinstance(dataset, Dataset)
    task = dataset.task()
    for split in SPLITS:
        samples = dataset.load(split)
        assert samples.inputs.shape == (len(samples), *task.input_shape)
        assert samples.inputs.dtype == torch.float32
        assert (float(samples.inputs.min()), float(samples.inputs.max())) == (0.0, 1.0)
        assert samples.labels.dtype == torch.int64
        assert torch.equal(samples.labels, dataset.labels(split))
        assert set(samples.labels.tolist()) == set(range(task.classes))


def test_fashion_mini_is_balanced_and_large_enough() -> None:
    dataset = FashionMini()
    counts = [torch.bincount(dataset.labels(split)).tolist() for split in SPLITS]
    assert counts == [[240] * 10, [60] * 10]


def test_fashion_mini_holds_each_published_image_once() -> None:
    for split in SPLITS:
        indices = FashionMini().published_indices(split)
        assert len(set(indices.tolist())) == len(FashionMini().labels(split))


def test_fashion_mini_is_what_was_published() -> None:
    """Set FL_PRIVACY_FASHION_MNIST to an .npz file with the published splits to run this."""
    path = Path(os.environ.get("FL_PRIVACY_FASHION_MNIST", ""))
    if not path.is_file():
        pytest.skip("FL_PRIVACY_FASHION_MNIST names no file")
    published = np.load(path, allow_pickle=False)
    for split in SPLITS:
        indices = FashionMini().published_indices(split).numpy()
        arrays = FashionMini().arrays(split)
        assert np.array_equal(published[f"x_{split}"][indices], arrays.inputs.squeeze(1).numpy())
        assert np.array_equal(published[f"y_{split}"][indices], arrays.labels.numpy())


def test_fashion_mini_travels_in_a_bundle() -> None:
    """Only text of these kinds does, and a bundle holds 10 MiB at most."""
    folder = Path(__file__).parents[2] / "fl_privacy" / "datasets"
    data = list(folder.glob("fashion_mini_*.json"))
    assert len(data) == 2
    assert sum(file.stat().st_size for file in data) < 2 * 2**20
    assert "MIT License" in (folder / "FASHION_MNIST_LICENSE.md").read_text()


def test_the_subset_has_about_the_moments_of_the_whole() -> None:
    """The mean of 2,400 images is within five standard errors of the published one."""
    task = FashionMini().task()
    images = FashionMini().load("train").inputs.flatten(1).mean(1)
    error = float(images.std()) / len(images) ** 0.5
    assert abs(float(images.mean()) - task.mean[0]) < 5 * error


def test_moments_are_those_of_all_values() -> None:
    values = torch.rand(2500, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    values[:, 1] *= 7
    mean, std = moments(Arrays(values, torch.zeros(2500, dtype=torch.int64)))
    expected = values.double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(expected.mean(1).tolist(), rel=1e-6)
    assert std == pytest.approx(expected.std(1, correction=0).tolist(), rel=1e-6)


def test_digits_are_normalized_by_their_own_moments() -> None:
    dataset = Digits()
    normalized = dataset.task().normalize(dataset.load("train").inputs)
    assert float(normalized.mean()) == pytest.approx(0, abs=1e-5)
    assert float(normalized.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert [len(dataset.labels(split)) for split in SPLITS] == [1437, 360]


def test_only_the_samples_asked_for_come_in_their_order() -> None:
    chosen = torch.tensor([700, 3, 3])
    samples = FashionMini().load("train", chosen)
    everything = FashionMini().load("train")
    assert torch.equal(samples.inputs, everything.inputs[chosen])
    assert torch.equal(samples.labels, everything.labels[chosen])
    assert len(FashionMini().load("train", torch.tensor([], dtype=torch.int64))) == 0


def test_loaded_samples_are_the_callers_own() -> None:
    dataset: ArrayDataset = Digits()
    for indices in (None, torch.arange(5)):
        samples = dataset.load("test", indices)
        inputs, labels = samples.inputs.clone(), samples.labels.clone()
        samples.inputs.fill_(9)
        samples.labels.fill_(9)
        again = dataset.load("test", indices)
        assert torch.equal(again.inputs, inputs)
        assert torch.equal(again.labels, labels)


@pytest.mark.parametrize("index", [-1, 2400])
def test_an_index_outside_the_split_is_refused(index: int) -> None:
    with pytest.raises(DatasetError, match=rf"train split, 0\.\.2399.*{index}"):
        FashionMini().load("train", torch.tensor([5, index]))

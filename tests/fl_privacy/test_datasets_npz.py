"""Data from .npz files: what is inferred, what is refused, and that messages name the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_privacy.component import ComponentError, create
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.npz import NPZ


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def split_file(folder: Path, rng: np.random.Generator, **changes: Any) -> Path:
    """Twelve training and six test images of three classes."""
    arrays: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
        "class_names": np.array(["a", "b", "c"]),
    }
    path = folder / "data.npz"
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def test_splits_shapes_classes_and_moments_come_from_the_file(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = split_file(tmp_path, rng)
    dataset = create("datasets", f"npz(path={str(path)!r})")
    raw = np.load(path, allow_pickle=False)
    task, train = dataset.task(), dataset.load("train")
    assert (task.input_shape, task.classes, task.class_names) == ((3, 6, 5), 3, ("a", "b", "c"))
    pixels = raw["x_train"] / 255
    assert task.mean == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-6)
    assert task.std == pytest.approx(pixels.std((0, 1, 2)), rel=1e-6)
    np.testing.assert_allclose(train.inputs.permute(0, 2, 3, 1), pixels, atol=1e-7)
    assert train.labels.tolist() == raw["y_train"].tolist()
    assert dataset.load("test", torch.tensor([4])).labels.tolist() == [1]


def test_networks_see_the_values_as_they_are_unless_normalized(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    dataset = NPZ(path=str(split_file(tmp_path, rng)), normalize=False)
    assert (dataset.task().mean, dataset.task().std) == ((0.0,) * 3, (1.0,) * 3)
    inputs = dataset.load("train").inputs
    assert torch.equal(dataset.task().normalize(inputs), inputs)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 8, 7), (1, 8, 7)),
        ((12, 8, 7, 1), (1, 8, 7)),
        ((12, 3, 8, 7), (3, 8, 7)),
        ((12, 8, 7, 4), (4, 8, 7)),
        ((12, 30), (1, 30)),
    ],
)
def test_layouts(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    path = split_file(
        tmp_path, rng, x_train=rng.random(shape), x_test=rng.random(shape[:1] and (6, *shape[1:]))
    )
    dataset = NPZ(path=str(path))
    assert dataset.task().input_shape == expected
    inputs = dataset.load("train").inputs
    assert inputs.dtype == torch.float32
    assert inputs.shape == (12, *expected)


def test_signals_keep_their_values_and_state_their_range(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    traces = rng.integers(-300, 200, (40, 25), dtype=np.int16)
    np.savez(tmp_path / "t.npz", traces=traces, bit=np.arange(40) % 2)
    dataset = NPZ(path=str(tmp_path / "t.npz"), x="traces", y="bit", test_fraction=0.25)
    values = torch.cat([dataset.load("train").inputs, dataset.load("test").inputs]).numpy()
    assert sorted(values.sum(2).ravel()) == sorted(traces.sum(1, dtype=np.int64))
    train = dataset.load("train").inputs
    task = dataset.task()
    assert (task.low, task.high) == (float(train.min()), float(train.max()))


def test_one_set_is_split_the_same_way_every_time_without_overlap(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    faces = np.arange(50, dtype=np.uint8).reshape(50, 1, 1) + np.zeros((50, 4, 4), dtype=np.uint8)
    male = np.arange(50) % 2
    male[:10] = -1
    np.savez(tmp_path / "f.npz", images=faces, male=male, person=np.arange(50))
    dataset = NPZ(
        path=str(tmp_path / "f.npz"),
        x="images",
        y="male",
        properties=("person",),
        test_fraction=0.2,
    )
    train, test = dataset.load("train"), dataset.load("test")
    assert (len(train), len(test)) == (32, 8)
    for part in (train, test):
        person = part.properties["person"]
        assert torch.equal(part.labels, person % 2)
        assert torch.equal((part.inputs[:, 0, 0, 0] * 255).round().long(), person)
    people = torch.cat([train.properties["person"], test.properties["person"]])
    assert sorted(people.tolist()) == list(range(10, 50))


def test_properties_of_given_splits_lose_the_split_in_their_name(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = split_file(tmp_path, rng, old_train=np.arange(12), old_test=np.arange(6) + 20)
    dataset = NPZ(path=str(path), properties=("old_{split}",))
    assert dataset.load("test").properties["old"].tolist() == list(range(20, 26))
    assert dataset.load("train", torch.tensor([7])).properties["old"].tolist() == [7]


def test_names_that_do_not_fit_the_classes_are_left_out(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = split_file(tmp_path, rng, class_names=np.array(["only", "two"]))
    assert NPZ(path=str(path)).task().class_names == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, "missing y_train, present x_train, x_test"),
        ({"y_train": np.arange(11)}, "expected y_train to hold 12 integers"),
        ({"y_train": np.linspace(0, 2, 12)}, "expected y_train to hold 12 integers.*float64"),
        ({"y_train": np.full(12, -1)}, "y_train holds no label of 0 or above"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "two or more classes"),
        ({"x_train": np.zeros((12, 6, 5, 7))}, "1, 3 or 4 channels"),
        ({"x_train": np.zeros((12, 6, 5))}, "vary in each channel"),
        ({"x_train": np.full((12, 6, 5), np.nan)}, "finite numbers"),
        ({"x_train": np.array(["text"] * 12)}, "x_train: expected numbers of shape"),
        ({"x_train": np.array([{}] * 12, dtype=object)}, "cannot read x_train, y_train.*pickled"),
    ],
)
def test_bad_arrays_are_refused_by_name(
    tmp_path: Path, rng: np.random.Generator, changes: dict[str, Any], message: str
) -> None:
    path = split_file(tmp_path, rng, **changes)
    with pytest.raises(DatasetError, match=message) as error:
        NPZ(path=str(path)).task()
    assert str(path) in str(error.value)


def test_files_that_are_none_are_refused_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "text.npz").write_text("no arrays")
    whole = split_file(tmp_path, rng).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 4
    (tmp_path / "flipped.npz").write_bytes(
        whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    )
    for name in ("text.npz", "cut.npz", "absent.npz", "flipped.npz"):
        with pytest.raises(DatasetError, match=name):
            NPZ(path=str(tmp_path / name)).labels("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("path='data.npz'", "absolute path"),
        ("path='/d.npz', x='images'", "either all of x, y and properties"),
        ("path='/d.npz', x='images', y='male'", "set test_fraction"),
        ("path='/d.npz', test_fraction=0.2", "without {split}"),
        ("path='/d.npz', test_fraction=1.0", "test_fraction"),
        ("", "path is required"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: str, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        create("datasets", f"npz({settings})")

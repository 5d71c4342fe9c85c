"""Any data in a NumPy .npz file, without pickles."""

from __future__ import annotations

import math
import zlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from fl_privacy.datasets.arrays import ArrayDataset, Arrays, DatasetError, Split, moments
from fl_privacy.seeding import generator
from fl_privacy.types import Task

RENAME = ". Name yours with x=..., y=..., properties=..."


def _absolute(path: str) -> str:
    if not Path(path).is_absolute():
        raise ValueError("expected the absolute path of an .npz file")
    return path


class NPZ(ArrayDataset):
    """Inputs, labels and properties from the arrays of one .npz file.

    ``x``, ``y`` and ``properties`` name arrays; ``{split}`` in a name stands for train and
    test. Names without it mean one set of samples, of which a random ``test_fraction`` (the
    same every time) is the test split. For the faces of LFW, say:
    ``npz(path='...', x='images', y='gender_male', test_fraction=0.2)``.

    Inputs are images ``[n, H, W]``, ``[n, H, W, C]`` or ``[n, C, H, W]`` with C of 1, 3 or 4,
    or signals ``[n, L]``, which become ``[n, 1, L]``. uint8 is taken as 0 to 1; other types
    keep their values, and `Task` has the training split's range where it leaves 0 to 1.
    Labels are integers from 0; samples of negative label (unknown) are left out. Mean and
    standard deviation are those of the training split; without ``normalize`` 0 and 1, so that
    networks see the values as they are.
    """

    path: Annotated[str, AfterValidator(_absolute)]
    x: str = "x_{split}"
    y: str = "y_{split}"
    properties: tuple[str, ...] = ()
    class_names: str = "class_names"
    test_fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    normalize: bool = True

    @model_validator(mode="after")
    def _splits(self) -> Self:
        has = {"{split}" in name for name in (self.x, self.y, *self.properties)}
        if len(has) > 1:
            raise ValueError("either all of x, y and properties contain {split}, or none")
        if has == {True} and self.test_fraction is not None:
            raise ValueError("test_fraction is for arrays without {split} in their names")
        if has == {False} and self.test_fraction is None:
            raise ValueError("x and y name no {split}: set test_fraction, such as 0.2")
        return self

    def task(self) -> Task:
        """Shape, classes and moments as found in the file."""
        return _task(self)

    def arrays(self, split: Split) -> Arrays:
        """The split, ``[n, C, H, W]`` or ``[n, 1, L]``, in the file's type."""
        return _splits(self)[split]


@cache
def _task(source: NPZ) -> Task:
    train = source.arrays("train")
    mean, std = moments(train)
    floats = train.inputs.dtype != torch.uint8
    low = min(0.0, float(train.inputs.min())) if floats else 0.0
    high = max(1.0, float(train.inputs.max())) if floats else 1.0
    classes = 1 + max(int(part.labels.max()) for part in _splits(source).values())
    if classes < 2 or min(std) == 0:
        raise DatasetError(
            f"{source.path}: expected two or more classes and inputs that vary in each channel, "
            f"got {classes} classes and standard deviations {std}"
        )
    if not source.normalize:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    return Task(
        input_shape=tuple(train.inputs.shape[1:]),
        classes=classes,
        mean=mean,
        std=std,
        low=low,
        high=high,
        class_names=_class_names(source, classes),
    )


@cache
def _splits(source: NPZ) -> dict[Split, Arrays]:
    """Both splits; every sample of negative label is gone."""
    if source.test_fraction is None:
        return {"train": _known(source, "train"), "test": _known(source, "test")}
    everything = _known(source, "")
    n = len(everything.labels)
    order = torch.randperm(n, generator=generator("npz", "test split"))
    test, train = torch.tensor_split(order, (math.ceil(source.test_fraction * n),))
    return {"train": everything.select(train), "test": everything.select(test)}


def _known(source: NPZ, split: str) -> Arrays:
    names = [name.replace("{split}", split) for name in (source.x, source.y, *source.properties)]
    x, y, *properties = read_arrays(Path(source.path), tuple(names), remedy=RENAME)
    for name, array in zip(names[1:], (y, *properties), strict=True):
        if array.shape != (len(x),) or array.dtype.kind not in "iub":
            raise DatasetError(
                f"{source.path}: expected {name} to hold {len(x)} integers, one for each of "
                f"{names[0]}, got {array.dtype} of shape {array.shape}"
            )
    labels = torch.from_numpy(y.astype(np.int64))
    keys = [name.replace("_{split}", "").replace("{split}", "") for name in source.properties]
    values = (torch.from_numpy(array.astype(np.int64)) for array in properties)
    inputs = _channels_first(x, f"{source.path}: {names[0]}")
    arrays = Arrays(inputs, labels, dict(zip(keys, values, strict=True)))
    known = torch.nonzero(labels >= 0).flatten()
    if not len(known):
        raise DatasetError(f"{source.path}: {names[1]} holds no label of 0 or above")
    return arrays if len(known) == len(labels) else arrays.select(known)


def _channels_first(x: np.ndarray[Any, Any], where: str) -> Tensor:
    """Inputs as ``[n, C, H, W]`` or ``[n, 1, L]``: uint8 stays, all else becomes float32."""
    if x.dtype.kind not in "iufb" or x.ndim not in (2, 3, 4) or not x.size:
        raise DatasetError(
            f"{where}: expected numbers of shape [n, H, W], [n, H, W, C], [n, C, H, W] or [n, L], "
            f"got {x.dtype} of shape {x.shape}"
        )
    inputs = torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float32))
    if not torch.isfinite(inputs).all():
        raise DatasetError(f"{where}: expected finite numbers, got nan or infinity")
    if x.ndim < 4:
        return inputs.unsqueeze(1)
    if x.shape[3] in (1, 3, 4):
        return inputs.permute(0, 3, 1, 2).contiguous()
    if x.shape[1] in (1, 3, 4):
        return inputs
    raise DatasetError(f"{where}: expected 1, 3 or 4 channels first or last, got {x.shape}")


def _class_names(source: NPZ, classes: int) -> tuple[str, ...]:
    """The names in the file, if there is one for each class."""
    if source.class_names not in array_names(Path(source.path)):
        return ()
    (names,) = read_arrays(Path(source.path), (source.class_names,))
    return tuple(map(str, names)) if names.shape == (classes,) else ()


def array_names(path: Path) -> list[str]:
    """Names of the arrays in a file.

    Raises:
        DatasetError: no such file, or no .npz file.
    """
    with _open(path) as file:
        return list(file.files)


def read_arrays(
    path: Path, names: tuple[str, ...], *, remedy: str = ""
) -> list[np.ndarray[Any, Any]]:
    """The named arrays of a file; ``remedy`` says what to do when one is missing.

    Raises:
        DatasetError: no such file, no .npz file, no such array, or a pickled one.
    """
    with _open(path) as file:
        missing = [name for name in names if name not in file.files]
        if missing:
            raise DatasetError(
                f"{path}: expected the arrays {', '.join(names)}; missing {', '.join(missing)}, "
                f"present {', '.join(file.files)}{remedy}"
            )
        try:
            return [file[name] for name in names]
        except (ValueError, EOFError, OSError, BadZipFile, zlib.error) as error:
            raise DatasetError(
                f"{path}: cannot read {', '.join(names)} (pickled arrays are refused): {error}"
            ) from error


def _open(path: Path) -> NpzFile:
    try:
        if not is_zipfile(path):
            raise DatasetError(
                f"{path}: expected an .npz file, got "
                f"{'a file that is none' if path.exists() else 'no such file'}"
            )
        file: NpzFile = np.load(path, allow_pickle=False)
    except (OSError, BadZipFile) as error:
        raise DatasetError(f"{path}: expected an .npz file that can be read: {error}") from error
    return file

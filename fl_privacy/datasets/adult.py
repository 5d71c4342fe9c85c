"""The Adult census: does a person earn more than 50,000 dollars a year?

Becker, Kohavi: Adult, UCI, 1996, https://doi.org/10.24432/C5XW20 (CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from filelock import FileLock
from pydantic import Field
from torch import Tensor

from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.attributed import AbsolutePath, AttributedDataset, MainTask
from fl_privacy.datasets.npz import read_arrays
from fl_privacy.datasets.properties import AttributeTable
from fl_privacy.datasets.torchvision import Folder, data_folder

UNKNOWN = "?"
"""How the file writes a value that is not known."""

SAME = {"education_num": "education"}
"""Columns that say the same as another one."""


class Adult(AttributedDataset):
    """Rows of the census as inputs ``[n, features]``; attributes ``income``, ``sex=Female``, ...

    Attributes are ``income`` (1: above 50,000 dollars) and ``COLUMN=VALUE`` of every category.
    Inputs are the numbers, scaled to 0..1 by their range in the whole file, and a column of 0
    and 1 for each category. The columns of the main task are never among them, those of the
    properties only with ``properties_as_inputs``; others may still tell of them (a ``Husband``
    is male). The published split is not used: rows are people, equal rows one person, shared
    as `AttributedDataset` says.

    ``path`` names an .npz file with ``x_num_S [n, 6]``, ``x_cat_S [n, 8]`` (codes into
    ``cat_COLUMN``) and ``y_S [n]`` for S of train and test, ``num_names`` and ``cat_names``.
    Without it scikit-learn fetches version 2 from OpenML.
    """

    path: Annotated[AbsolutePath, Field(description=".npz file; empty: from OpenML")] = ""
    main_task: MainTask = "income"
    folder: Folder = ""
    properties_as_inputs: Annotated[
        bool, Field(description="the properties' columns are among the inputs")
    ] = False

    def table(self) -> AttributeTable:
        """float32 ``[n, features]``."""
        hidden = self.classes() + (() if self.properties_as_inputs else self.properties)
        census = _npz(Path(self.path)) if self.path else _published(data_folder(self.folder))
        return _table(census, frozenset(name.partition("=")[0] for name in hidden))


@dataclass(frozen=True, eq=False)
class Census:
    """``numbers`` and ``codes`` ``[n]`` by column, the ``values`` of each code, ``income [n]``."""

    numbers: Mapping[str, np.ndarray[Any, Any]]
    codes: Mapping[str, np.ndarray[Any, Any]]
    values: Mapping[str, tuple[str, ...]]
    income: np.ndarray[Any, Any]


@cache
def _table(census: Census, hidden: frozenset[str]) -> AttributeTable:
    inputs = [
        _scaled(column)
        for name, column in census.numbers.items()
        if not {name, SAME.get(name)} & hidden
    ]
    attributes = {"income": torch.from_numpy(census.income.astype(np.int8))}
    for name, codes in census.codes.items():
        unknown = torch.from_numpy(codes == _code(census.values[name], UNKNOWN))
        for code, value in enumerate(census.values[name]):
            has = torch.from_numpy(codes == code)
            if name not in hidden:
                inputs.append(has.to(torch.float32))
            if value != UNKNOWN:
                attributes[f"{name}={value}"] = has.to(torch.int8).masked_fill(unknown, -1)
    return AttributeTable(torch.stack(inputs, dim=1), _rows(census), attributes)


def _rows(census: Census) -> Tensor:
    """Who each row is, ``[n]`` int64: equal rows are one person."""
    columns = (*census.numbers.values(), *census.codes.values(), census.income)
    rows = np.stack([column.astype(np.int64) for column in columns], axis=1)
    return torch.from_numpy(np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1))


def _scaled(column: np.ndarray[Any, Any]) -> Tensor:
    values = torch.from_numpy(column.astype(np.float64))
    return ((values - values.min()) / (values.max() - values.min()).clamp_min(1)).float()


def _code(values: tuple[str, ...], value: str) -> int:
    return values.index(value) if value in values else -1


@cache
def _npz(path: Path) -> Census:
    numeric, categorical = read_arrays(path, ("num_names", "cat_names"))

    def both(name: str) -> np.ndarray[Any, Any]:
        return np.concatenate(read_arrays(path, (f"{name}_train", f"{name}_test")))

    numbers, codes = both("x_num"), both("x_cat")
    named = read_arrays(path, tuple(f"cat_{name}" for name in categorical))
    return Census(
        {str(name): numbers[:, i] for i, name in enumerate(numeric)},
        {str(name): codes[:, i] for i, name in enumerate(categorical)},
        {
            str(name): tuple(map(str, values))
            for name, values in zip(categorical, named, strict=True)
        },
        both("y"),
    )


@cache
def _published(folder: Path) -> Census:
    """Read what is there; the first of several processes downloads, the others wait for it."""
    from sklearn.datasets import fetch_openml

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".adult.lock"):
            frame = fetch_openml("adult", version=2, data_home=folder, as_frame=True).frame
    except (OSError, ValueError, ImportError) as error:
        raise DatasetError(
            f"cannot have adult: expected version 2 of OpenML's adult below {folder}, or a "
            f"download of it. Go online once, or name an .npz file with path. Tried and got: "
            f"{error}"
        ) from error
    return census_of(frame)


def census_of(frame: Any) -> Census:
    """A pandas frame as OpenML has it: ``class`` of ``<=50K`` and ``>50K``, hyphens in names."""
    frame = frame.rename(columns=lambda name: name.replace("-", "_"))
    income = (frame.pop("class") == ">50K").to_numpy()
    words = {name: frame[name] for name in frame if frame[name].dtype.kind not in "iuf"}
    coded = {
        name: np.unique(column.astype(object).fillna(UNKNOWN).astype(str), return_inverse=True)
        for name, column in words.items()
    }
    return Census(
        {name: frame[name].to_numpy() for name in frame if name not in words},
        {name: codes for name, (_, codes) in coded.items()},
        {name: tuple(map(str, values)) for name, (values, _) in coded.items()},
        income,
    )

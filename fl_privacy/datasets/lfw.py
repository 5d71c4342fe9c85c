"""Labeled Faces in the Wild, with the attributes of Kumar et al.

Huang et al., 2007, University of Massachusetts, technical report 07-49; Kumar et al.: Attribute
and Simile Classifiers for Face Verification, ICCV 2009. torchvision no longer fetches LFW (its
server is gone) and never had the attributes, so both come from files that the user has.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.attributed import (
    AbsolutePath,
    AttributedDataset,
    MainTask,
    PictureSize,
)
from fl_privacy.datasets.npz import array_names, read_arrays
from fl_privacy.datasets.pictures import (
    Box,
    Size,
    by_sign,
    channels_first,
    read_people,
    resized,
)
from fl_privacy.datasets.properties import AttributeTable

FACE: Box = (78, 70, 172, 195)
"""The part of a 250x250 picture that scikit-learn's ``fetch_lfw_people`` keeps."""

MO_SIZE = (62, 47)


class LFW(AttributedDataset):
    """Faces of LFW from files; attributes by the sign of the scores of Kumar et al.

    ``path`` is either an .npz file with the arrays ``images [n, H, W, 3]``, ``person_id [n]``,
    ``kumar_attributes [m, a]``, ``kumar_index [m]`` (the image of each row of scores) and
    ``kumar_names [a]``; ``gender_male [n]`` (1, 0, -1 unknown), if there, is the attribute
    ``Male`` instead of the scores of that name, and ``facer_prob255 [n, b]`` with
    ``facer_names`` and ``facer_valid`` adds attributes ``facer:NAME``, which a network
    predicted. Or it is the folder of one of the published sets (original, funneled or deep
    funneled), with ``lfw_attributes.txt`` in it or at ``attributes``; faces are cut as
    scikit-learn does and resized to 62x47 unless ``size`` says otherwise.
    """

    path: Annotated[AbsolutePath, Field(description=".npz file, or folder PERSON/NUMBER.jpg")]
    main_task: MainTask = "Male"
    attributes: Annotated[
        AbsolutePath, Field(description="table of scores; empty: path/lfw_attributes.txt")
    ] = ""
    size: PictureSize = None

    def table(self) -> AttributeTable:
        """uint8 ``[n, 3, H, W]``."""
        if Path(self.path).is_dir():
            table = Path(self.attributes or f"{self.path}/lfw_attributes.txt")
            return _folder(Path(self.path), table, self.size or MO_SIZE)
        return _npz(Path(self.path), self.size)


@cache
def _folder(folder: Path, table: Path, size: Size) -> AttributeTable:
    return read_people(folder, table, size, FACE)


@cache
def _npz(path: Path, size: Size | None) -> AttributeTable:
    needed = ("images", "person_id", "kumar_attributes", "kumar_index", "kumar_names")
    images, person, scores, index, names = read_arrays(path, needed)
    there = array_names(path)
    attributes = {
        str(name): _spread(by_sign(column), index, len(images), f"{path}: kumar_index")
        for name, column in zip(names, scores.T, strict=True)
    }
    if "gender_male" in there:
        (male,) = read_arrays(path, ("gender_male",))
        attributes["Male"] = torch.from_numpy(male.astype(np.int8))
    if "facer_prob255" in there:
        likely, known, named = read_arrays(path, ("facer_prob255", "facer_valid", "facer_names"))
        for name, column in zip(named, likely.T, strict=True):
            values = np.where(known, column >= 128, -1).astype(np.int8)
            attributes[f"facer:{name}"] = torch.from_numpy(values)
    return AttributeTable(
        channels_first(resized(images, size)), torch.from_numpy(person.astype(np.int64)), attributes
    )


def _spread(values: Tensor, index: np.ndarray[Any, Any], n: int, where: str) -> Tensor:
    """Values ``[m]`` at their samples ``index [m]`` of ``n``; -1 for all other samples."""
    if len(np.unique(index)) != len(index) or index.min() < 0 or index.max() >= n:
        raise DatasetError(f"{where}: expected different indices in 0..{n - 1}, one a row")
    spread = torch.full((n,), -1, dtype=torch.int8)
    spread[torch.from_numpy(index.astype(np.int64))] = values
    return spread

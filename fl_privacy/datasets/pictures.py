"""Pictures of people: resized, and read from folders beside a table of attributes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.properties import AttributeTable
from fl_privacy.datasets.torchvision import data_folder

Size = tuple[int, int]
"""Height and width in pixels."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels: the part of a picture to keep."""

SUFFIXES = (".jpg", ".jpeg", ".png")


def channels_first(pictures: np.ndarray[Any, Any]) -> Tensor:
    """``[n, H, W, 3]`` as a view ``[n, 3, H, W]``."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def resized(pictures: np.ndarray[Any, Any], size: Size | None) -> np.ndarray[Any, Any]:
    """uint8 ``[n, H, W, 3]`` in another size (bilinear, antialiased); None: as they are."""
    if size is None or pictures.shape[1:3] == size:
        return pictures
    return np.stack([_pixels(Image.fromarray(picture), size) for picture in pictures])


def read_pictures(paths: Sequence[Path], size: Size, box: Box | None = None) -> Any:
    """Picture files, cut to ``box`` and resized: uint8 ``[n, H, W, 3]``, copy on write.

    The result is kept in the data folder, so that the first process reads each picture and the
    others map one file.

    Raises:
        DatasetError: a file that is no picture.
    """
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([size, box, stats]).encode()).hexdigest()
    kept = data_folder("") / "resized" / f"{key}.npy"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            pictures = np.empty((len(paths), *size, 3), dtype=np.uint8)
            for i, path in enumerate(paths):
                pictures[i] = _read(path, size, box)
            half = kept.with_suffix(".half")
            with half.open("wb") as file:
                np.save(file, pictures, allow_pickle=False)
            half.replace(kept)
    return np.load(kept, mmap_mode="c", allow_pickle=False)


def _read(path: Path, size: Size, box: Box | None) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as picture:
            if box and (picture.width < box[2] or picture.height < box[3]):
                raise DatasetError(
                    f"{path}: expected {box[2]} x {box[3]} pixels or more, of which {box} are "
                    f"kept, got {picture.width} x {picture.height}"
                )
            return _pixels(picture.convert("RGB").crop(box), size)
    except (UnidentifiedImageError, OSError) as error:
        raise DatasetError(f"{path}: expected a picture: {error}; remove or mend it") from error


def _pixels(picture: Image.Image, size: Size) -> np.ndarray[Any, Any]:
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def scores_table(path: Path) -> tuple[tuple[str, ...], dict[tuple[str, int], list[float]]]:
    """Attribute names, and the scores of each (person, image number).

    The format in which PubFig and the attributes of LFW are published (Kumar et al.: Attribute
    and Simile Classifiers for Face Verification, ICCV 2009): values apart by tabs; a line of
    comment, then ``#``, ``person``, ``imagenum`` and the attributes' names, then a line a picture.
    Names of people count the same with blanks and with underscores.

    Raises:
        DatasetError: no such file, or another format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: expected a table of attributes: {error}") from error
    heads = [line.lstrip("# \t").split("\t") for line in lines if line.startswith("#")]
    named = [head for head in heads if head[:2] == ["person", "imagenum"]]
    if not named:
        raise DatasetError(
            f"{path}: expected a line '#', 'person', 'imagenum' and names of attributes, apart by "
            f"tabs, as in pubfig_attributes.txt and lfw_attributes.txt"
        )
    names = tuple(named[0][2:])
    rows: dict[tuple[str, int], list[float]] = {}
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") or not line.strip():
            continue
        person, _, rest = line.partition("\t")
        values = rest.split("\t")
        try:
            rows[_plain(person), int(values[0])] = [float(value) for value in values[1:]]
            if len(values) != 1 + len(names):
                raise ValueError(f"{len(values) - 1} values for {len(names)} attributes")
        except ValueError as error:
            raise DatasetError(f"{path}, line {number}: {error}") from error
    return names, rows


def by_sign(scores: np.ndarray[Any, Any]) -> Tensor:
    """Scores as int8 attributes: above 0 has it, below has not, 0 and nan unknown."""
    values = np.where(scores > 0, 1, np.where(scores < 0, 0, -1))
    return torch.from_numpy(values.astype(np.int8))


def read_people(folder: Path, table: Path, size: Size, box: Box | None = None) -> AttributeTable:
    """The pictures of a folder that a table of scores lists.

    A picture lies at ``folder/person/NAME.jpg`` (or .jpeg, .png), where NAME ends in the image
    number: ``Aaron_Eckhart/Aaron_Eckhart_0001.jpg`` and ``Aaron Eckhart/1.jpg`` alike.

    Raises:
        DatasetError: no listed picture is there, or one twice; a bad table or picture.
    """
    names, rows = scores_table(table)
    found: dict[tuple[str, int], Path] = {}
    for key, path in _pictures(folder):
        if key in found:
            raise DatasetError(f"{found[key]} and {path} are the same picture; remove one")
        found[key] = path
    keys = sorted(found.keys() & rows.keys())
    if not keys:
        raise DatasetError(
            f"{folder} holds {len(found)} pictures PERSON/NUMBER.jpg, and {table} lists {len(rows)}"
            f", of which none is there"
        )
    people = {person: i for i, person in enumerate(sorted({person for person, _ in keys}))}
    values = by_sign(np.array([rows[key] for key in keys], dtype=np.float64))
    return AttributeTable(
        channels_first(read_pictures([found[key] for key in keys], size, box)),
        torch.tensor([people[person] for person, _ in keys]),
        {name: values[:, i] for i, name in enumerate(names)},
    )


def _pictures(folder: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    for path in sorted(folder.glob("*/*")):
        number = re.search(r"(\d+)$", path.stem)
        if number and path.suffix.lower() in SUFFIXES:
            yield (_plain(path.parent.name), int(number[1])), path


def _plain(person: str) -> str:
    return person.strip().replace("_", " ")

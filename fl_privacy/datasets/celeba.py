"""CelebA: faces of celebrities with 40 attributes.

Liu et al.: Deep Learning Face Attributes in the Wild, ICCV 2015,
https://arxiv.org/abs/1411.7766. For research only; the pictures may not be handed on.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from filelock import FileLock
from pydantic import Field

from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.attributed import (
    AbsolutePath,
    AttributedDataset,
    MainTask,
    PictureSize,
)
from fl_privacy.datasets.npz import read_arrays
from fl_privacy.datasets.pictures import Size, channels_first, read_pictures, resized
from fl_privacy.datasets.properties import AttributeTable
from fl_privacy.datasets.torchvision import Folder, data_folder
from fl_privacy.types import PositiveInt

MO_SIZE = (64, 64)


class CelebA(AttributedDataset):
    """The first ``limit`` faces of CelebA, from an .npz file or fetched by torchvision.

    ``path`` names an .npz file with the arrays ``images [n, H, W, 3]``, ``attributes [n, a]``
    (1, 0, -1 unknown), ``attribute_names [a]`` and ``identity [n]``; any faces in this layout
    will do. Without it torchvision fetches the aligned pictures (1.4 GB, with gdown), which
    become 64x64 unless ``size`` says otherwise, the whole picture squeezed into it.
    """

    path: Annotated[AbsolutePath, Field(description=".npz file; empty: by torchvision")] = ""
    main_task: MainTask = "Eyeglasses"
    folder: Folder = ""
    limit: Annotated[PositiveInt, Field(description="so many pictures, the first ones")] = 15_000
    size: PictureSize = None

    def table(self) -> AttributeTable:
        """uint8 ``[n, 3, H, W]``."""
        if self.path:
            return _npz(Path(self.path), self.size, self.limit)
        return _published(data_folder(self.folder), self.size or MO_SIZE, self.limit)


@cache
def _npz(path: Path, size: Size | None, limit: int) -> AttributeTable:
    needed = ("images", "attributes", "identity", "attribute_names")
    *arrays, names = read_arrays(path, needed)
    images, values, identity = (array[:limit] for array in arrays)
    columns = torch.from_numpy(values.astype(np.int8))
    return AttributeTable(
        channels_first(resized(images, size)),
        torch.from_numpy(identity.astype(np.int64)),
        {str(name): columns[:, i] for i, name in enumerate(names)},
    )


@cache
def _published(folder: Path, size: Size, limit: int) -> AttributeTable:
    """Read what is there; the first of several processes downloads, the others wait for it."""
    from torchvision import datasets as published

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".CelebA.lock"):
            source = published.CelebA(folder, split="all", download=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise DatasetError(
            f"cannot have CelebA: expected img_align_celeba and the published lists in "
            f"{folder}/celeba, or a download of them (needs: pip install gdown). Put the published "
            f"files there by hand, or name an .npz file with path. Tried and got: {error}"
        ) from error
    pictures = Path(source.root) / source.base_folder / "img_align_celeba"
    paths = [pictures / name for name in source.filename[:limit]]
    columns = source.attr[:limit].to(torch.int8).unbind(1)
    attributes = dict(zip(source.attr_names, columns, strict=False))  # the last name may be empty
    return AttributeTable(
        channels_first(read_pictures(paths, size)), source.identity[:limit, 0], attributes
    )

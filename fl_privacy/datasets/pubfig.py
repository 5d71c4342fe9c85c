"""PubFig: public figures with the attributes of Kumar et al., from pictures the user has.

Kumar et al.: Attribute and Simile Classifiers for Face Verification, ICCV 2009,
https://www.cs.columbia.edu/CAVE/databases/pubfig/. The authors publish addresses, not pictures,
and many are gone: what is read is what is there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fl_privacy.datasets.attributed import (
    AbsolutePath,
    AttributedDataset,
    MainTask,
    PictureSize,
)
from fl_privacy.datasets.pictures import Size, read_people
from fl_privacy.datasets.properties import AttributeTable

MO_SIZE = (100, 100)


class PubFig(AttributedDataset):
    """A folder PERSON/NUMBER.jpg of faces, already cut out, and ``pubfig_attributes.txt``.

    NUMBER is the ``imagenum`` of the table, at the end of the file's name. Pictures that the
    table does not list are left out, and rows without a picture. An attribute is the sign of
    its score. Pictures become 100x100 unless ``size`` says otherwise.
    """

    path: Annotated[AbsolutePath, Field(description="folder PERSON/NUMBER.jpg")]
    main_task: MainTask = "Male"
    attributes: Annotated[
        AbsolutePath, Field(description="table of scores; empty: path/pubfig_attributes.txt")
    ] = ""
    size: PictureSize = None

    def table(self) -> AttributeTable:
        """uint8 ``[n, 3, H, W]``."""
        table = Path(self.attributes or f"{self.path}/pubfig_attributes.txt")
        return _read(Path(self.path), table, self.size or MO_SIZE)


@cache
def _read(folder: Path, table: Path, size: Size) -> AttributeTable:
    return read_people(folder, table, size)

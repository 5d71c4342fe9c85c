"""What stands in a recording: manifest, index lines, schemas, and how tensors become bytes.

Tensors are stored as ``t0, t1, ...`` (safetensors sorts names and has no room for a
tensor called ``__metadata__``); their names, in order, stand in the schema.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save
from torch import nn

from fl_privacy.types import LocalTraining, Task

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LINES_PER_SEGMENT = 1000
LINE_BYTES = 512
UPDATE_FILE = r"updates/[0-9]+/-?[0-9]+/[0-9]+\.safetensors"
STORABLE = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64"}
)

Array = NDArray[np.generic]
Arrays = Mapping[str, Array]
Kind = Literal["parameter", "buffer", "unknown"]
Payload = Literal["weights", "update", "sparse-update"]
"""What an update file holds: parameters, their differences to what was sent, or those that
differ, encoded as in `fl_privacy.sparse`."""


Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class RecordingError(ValueError):
    """A recording that cannot be read or written; the message names the file."""


class Manifest(BaseModel):
    """What a recording is of; written once, when it is created.

    ``id`` tells it from any other recording; it is empty in recordings older than the field.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    id: str = Field(default_factory=lambda: uuid4().hex)
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    model: str | None = None
    dataset: str | None = None
    task: Task | None = None
    local_training: LocalTraining | None = None
    run_config: dict[str, bool | int | float | str] = {}
    versions: dict[str, str] = {}
    code_digest: str = ""


MISSED = "error: not recorded"
LOST = "error: lost, the recording was interrupted"
NOTHING = "error: nothing is recorded of this round"
"""Statuses of what came and could not be stored."""


class Entry(BaseModel):
    """One index line: one reply of one client, or its failure.

    ``n`` counts the entries of an attempt. ``file`` is empty when there is none (status
    ``error: reason``), else it lies in ``updates``. The digests are SHA-256 in hexadecimal:
    ``sha256`` of the file, ``schema_digest`` and ``global_digest`` name files in ``schemas``
    and ``globals``.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)

    attempt: int
    round: int
    node: str
    n: int
    file: Annotated[str, Field(pattern=f"^({UPDATE_FILE})?$")] = ""
    bytes: int = 0
    sha256: Digest = ""
    schema_digest: Annotated[Digest, Field(alias="schema")] = ""
    global_digest: Annotated[Digest, Field(alias="global")] = ""
    num_examples: int | None = None
    status: str = "ok"
    payload: Payload = "weights"

    @property
    def ok(self) -> bool:
        """Whether the client returned tensors."""
        return self.status == "ok"

    @property
    def unrecorded(self) -> bool:
        """Whether this stands for what came and could not be stored; no client can say so."""
        return not self.global_digest and self.status.startswith((MISSED, LOST, NOTHING))


class TensorSpec(BaseModel):
    """Name, shape and numpy dtype of one stored tensor."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = "unknown"


@dataclass(frozen=True)
class Layout:
    """Which tensors of a model are parameters, which buffers, which the same tensor twice."""

    kinds: Mapping[str, Kind] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of ``model.state_dict()``; an alias points at the first name."""
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        kinds: dict[str, Kind] = {}
        aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            kinds[name] = "parameter" if name in parameters else "buffer"
            if first.setdefault(id(tensor), name) != name:
                aliases[name] = first[id(tensor)]
        return cls(kinds, aliases)


NO_LAYOUT = Layout()


@dataclass(frozen=True)
class Reply:
    """One reply to be recorded; ``arrays`` is None for a failure, and ``status`` says why.

    A sparse update needs ``schema_digest``: it has the tensors of what was sent.
    """

    round: int
    node: str
    arrays: Arrays | None
    num_examples: int | None
    global_digest: str
    layout: Layout = NO_LAYOUT
    status: str = "ok"
    payload: Payload = "weights"
    schema_digest: str = ""


class Schema(BaseModel):
    """The tensors of a reply in order: the i-th is stored as ``t<i>``.

    A sparse update has the schema of what was sent, and is stored as the only tensor, ``t0``.
    """

    model_config = ConfigDict(frozen=True)

    tensors: tuple[TensorSpec, ...]
    aliases: dict[str, str] = {}

    @classmethod
    def of(cls, arrays: Arrays, layout: Layout) -> Schema:
        """The schema of ``arrays``.

        Raises:
            RecordingError: a dtype that safetensors has no room for.
        """
        for name, array in arrays.items():
            if array.dtype.name not in STORABLE:
                raise RecordingError(
                    f"tensor {name!r} has dtype {array.dtype.name}, expected one of "
                    f"{', '.join(sorted(STORABLE))}; convert it before it is sent"
                )
        tensors = tuple(
            TensorSpec(
                name=name,
                shape=array.shape,
                dtype=array.dtype.name,
                kind=layout.kinds.get(name, "unknown"),
            )
            for name, array in arrays.items()
        )
        aliases = {a: b for a, b in layout.aliases.items() if a in arrays and b in arrays}
        return cls(tensors=tensors, aliases=aliases)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names in order."""
        return tuple(tensor.name for tensor in self.tensors)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Name -> position."""
        return {name: i for i, name in enumerate(self.names)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in order."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as they are before any encoding."""
        return sum(np.dtype(t.dtype).itemsize * math.prod(t.shape) for t in self.tensors)


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def encode(arrays: Arrays, metadata: dict[str, str]) -> bytes:
    """Arrays as a safetensors file, ``t0, t1, ...`` in order, bit for bit.

    Strided and big-endian arrays become C-contiguous and little-endian; scalars keep
    their shape ``()``.
    """
    plain = {
        f"t{i}": np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        for i, array in enumerate(arrays.values())
    }
    return bytes(save(plain, metadata=metadata))


def line_of(entry: Entry) -> bytes:
    """The index line of an entry, its status cut so that the line keeps its limit.

    Raises:
        RecordingError: the line is too long whatever the status.
    """
    status = entry.status.encode("utf-8", "replace")
    while True:
        text = status.decode("utf-8", "ignore")
        short = entry.model_copy(update={"status": text})
        line = short.model_dump_json(by_alias=True).encode() + b"\n"
        if len(line) <= LINE_BYTES:
            return line
        if not status:
            raise RecordingError(
                f"index line of node {entry.node[:40]!r} in round {entry.round} needs {len(line)} "
                f"bytes, expected at most {LINE_BYTES}; use a shorter node name"
            )
        status = status[: min(len(status) - 1, LINE_BYTES)]

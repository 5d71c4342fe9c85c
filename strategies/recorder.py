"""Flower messages into a recording: what the strategy wrapper and the grid tap share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
from flwr.app import Array, Message, RecordDict

from fl_privacy.recording import Arrays, Layout, RecordingWriter, Reply
from fl_privacy.recording_format import STORABLE
from fl_privacy.sparse import ARRAY

MALFORMED = (ValueError, TypeError, OverflowError, LookupError, AttributeError)
"""What numpy raises for a header that says the wrong things."""

UNPARSABLE = (SyntaxError, TokenError, MemoryError, RecursionError)
"""What Python's parser, to which numpy gives the header, raises for one that says nothing."""

NUM_EXAMPLES_KEYS = ("num-examples", "num_examples")


class UnreadableArraysError(ValueError):
    """A message whose arrays cannot be recorded; the message names the array."""


def array_of(name: str, array: Array) -> np.ndarray:
    """The numpy array in a Flower array, a view of its bytes; nothing is unpickled.

    Raises:
        UnreadableArraysError: not a whole ``.npy``, or a dtype that cannot be stored.
    """
    file = BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = header(file)
        if dtype.name not in STORABLE:
            raise ValueError(f"dtype {dtype.name} cannot be stored")
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}, expected no negative size")
        flat = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=file.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except (*MALFORMED, *UNPARSABLE) as error:
        reason = str(error) or type(error).__name__
        raise UnreadableArraysError(f"array {name!r}: {reason}") from error


def arrays_of(content: RecordDict) -> dict[str, np.ndarray]:
    """All arrays of a message, in order.

    Names of the first ArrayRecord are kept; those of any further one are prefixed with
    ``<record>/``. Flower's placeholder for "no parameters" (no bytes at all) is left out.

    Raises:
        UnreadableArraysError: see `array_of`.
    """
    found: dict[str, np.ndarray] = {}
    for position, (key, record) in enumerate(content.array_records.items()):
        prefix = f"{key}/" if position else ""
        for name, array in record.items():
            if array.data:
                found[prefix + name] = array_of(prefix + name, array)
    return found


def num_examples_of(content: RecordDict, keys: Sequence[str]) -> int | None:
    """The number of examples a client reports under the first of ``keys`` it uses."""
    for key in keys:
        for record in content.metric_records.values():
            value = record.get(key)
            if isinstance(value, int | float) and 0 <= value < 2**63:
                return int(value)
    return None


class Sent(NamedTuple):
    """What a client was sent: the digests of the stored file and of its schema."""

    digest: str
    schema: str


class Recorder:
    """Turns messages into what a recording holds, as they were sent and received.

    Args:
        writer: the open recording.
        layout: which tensors are parameters and which buffers, where the model is known.
        weight_key: the metric that holds the number of examples, tried first.
    """

    def __init__(self, writer: RecordingWriter, layout: Layout, weight_key: str = "") -> None:
        self.writer = writer
        self.layout = layout
        self.keys = (weight_key, *NUM_EXAMPLES_KEYS) if weight_key else NUM_EXAMPLES_KEYS
        self._last: tuple[list[tuple[str, bytes]], Sent | None] = ([], None)

    def sent(self, content: RecordDict) -> Sent:
        """Store what a client is sent, once per content.

        The bytes of an array never change, so the same bytes objects need no second look.
        """
        arrays: list[tuple[str, bytes]] = [
            (f"{key}/{name}", array.data)
            for key, record in content.array_records.items()
            for name, array in record.items()
        ]
        last, before = self._last
        if before and self.writer.holds(before.digest) and _identical(arrays, last):
            return before
        schema, digest = self.writer.put_global(arrays_of(content), self.layout)
        sent = Sent(digest, schema)
        self._last = (arrays, sent)
        return sent

    def reply(self, message: Message, *, round: int, node: int, sent: Sent) -> Reply:
        """What a client answered, ready to be written: its arrays, or why there are none."""
        arrays, num_examples, status = self._content(message)
        sparse = arrays is not None and list(arrays) == [ARRAY]
        return Reply(
            round=round,
            node=str(node),
            arrays=arrays,
            num_examples=num_examples,
            global_digest=sent.digest,
            layout=self.layout,
            status=status,
            payload="sparse-update" if sparse else "weights",
            schema_digest=sent.schema if sparse else "",
        )

    def _content(self, reply: Message) -> tuple[Arrays | None, int | None, str]:
        if reply.has_error():
            return None, None, error_status(reply.error.reason or f"code {reply.error.code}")
        num_examples = num_examples_of(reply.content, self.keys)
        try:
            arrays = arrays_of(reply.content)
        except UnreadableArraysError as error:
            return None, num_examples, error_status(str(error))
        if not arrays:
            return None, num_examples, error_status("the reply holds no arrays")
        return arrays, num_examples, "ok"


def error_status(reason: str) -> str:
    """A reason on one line."""
    return f"error: {' '.join(reason.split())}"


def _identical(some: list[tuple[str, bytes]], others: list[tuple[str, bytes]]) -> bool:
    return len(some) == len(others) and all(
        a is b and name == other for (name, a), (other, b) in zip(some, others, strict=True)
    )

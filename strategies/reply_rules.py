"""What is wrong with a reply: pure rules, sizes before everything that costs.

Each returns a sentence, or an empty text where nothing is wrong. Whatever a client chose is
quoted (``repr``, cut short), so that it steers no terminal and fills no log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fl_privacy.claims import claim_flaw
from fl_privacy.recording import Arrays
from fl_privacy.sparse import ARRAY, SparseError, decode
from strategies.recorder import UnreadableArraysError, array_of

HEADER_BYTES = 1024
"""More than the header of any ``.npy`` with a plain dtype."""

OTHER_BYTES = 2**20
"""What all of a reply but its arrays may hold: metrics, configs, names."""

NAME_CHARACTERS = 256

_SCALAR_BYTES = 8
_WHOLE = 2**63
_PATH = re.compile(r"^[/\\~]|^[A-Za-z]:[/\\]|\\|(^|/)\.\.?(/|$)")


class Expected(NamedTuple):
    """One tensor as it has to come back: its shape, and the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]

    @property
    def nbytes(self) -> int:
        """The bytes it needs at most, without a header."""
        return math.prod(self.shape) * max(np.dtype(name).itemsize for name in self.dtypes)


def size_flaw(content: RecordDict, most_array_bytes: int) -> str:
    """More bytes than the model has, or than a reply says besides; counted, not unpacked."""
    records = content.array_records.values()
    arrays = sum(len(array.data) for record in records for array in record.values())
    if arrays > most_array_bytes:
        return f"{arrays} bytes of arrays, expected at most {most_array_bytes}"
    other = sum(_other_bytes(content))
    return f"{other} bytes besides arrays, expected at most {OTHER_BYTES}" * (other > OTHER_BYTES)


def _other_bytes(content: RecordDict) -> Iterator[int]:
    for key, record in content.items():
        yield len(key)
        if isinstance(record, ArrayRecord):  # whose names are compared with those sent
            continue
        for name, value in record.items():
            values = value if isinstance(value, list) else [value]
            yield len(name) + _SCALAR_BYTES
            yield sum(len(v) if isinstance(v, str | bytes) else _SCALAR_BYTES for v in values)


def name_flaw(content: RecordDict) -> str:
    """A name of a record, metric or config that is too long, looks like a path, or is invisible.

    A ``/`` within a name is a common way to group metrics, and passes; arrays have the names
    that were sent, whatever these are.
    """
    for key, record in content.items():
        names = [] if isinstance(record, ArrayRecord) else list(record)
        for name in (key, *names):
            if len(name) > NAME_CHARACTERS:
                return f"name {_short(name)} has {len(name)} characters, at most {NAME_CHARACTERS}"
            if not name.isprintable() or not name.strip():
                return f"name {_short(name)} holds what cannot be seen"
            if _PATH.search(name):
                return f"name {_short(name)} looks like a path"
    return ""


def metrics_flaw(
    record: MetricRecord, weight_key: str, most_examples: int, withheld: frozenset[str]
) -> str:
    """A metric that is not finite, or a number of examples that is none.

    NaN passes for those that a client may keep to itself (``withheld``).
    """
    for name, value in record.items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            kept_back = name in withheld and isinstance(number, float) and math.isnan(number)
            if not kept_back and not _is_finite(number):
                return f"metric {_short(name)} is {str(number)[:20]}, expected a finite number"
    if not weight_key:
        return ""
    if weight_key not in record:
        return f"metric {weight_key!r} is missing"
    weight = record[weight_key]
    if isinstance(weight, list):
        return f"metric {weight_key!r} is a list, expected a number"
    return claim_flaw(weight, most_examples)


def _is_finite(number: float) -> bool:
    return -_WHOLE <= number < _WHOLE if isinstance(number, int) else math.isfinite(number)


def arrays_flaw(
    record: ArrayRecord, expected: Mapping[str, Expected], sent: Arrays, *, sparse: bool
) -> str:
    """Arrays that are not those that were sent: names, order, bytes, shapes, dtypes, values.

    With ``sparse``, an encoded update is decoded for the check, and dropped again.
    """
    try:
        if sparse and list(record) == [ARRAY]:
            arrays = decode(sent, array_of(ARRAY, record[ARRAY]).tobytes())
            return _first(tensor_flaw(name, expected[name], arrays[name]) for name in expected)
        if list(record) != list(expected):
            return _names_flaw(list(record), list(expected))
        return _first(_array_flaw(name, expected[name], record[name]) for name in expected)
    except SparseError as error:
        return f"the sparse update cannot be decoded: {error}"
    except UnreadableArraysError as error:
        return str(error)


def _names_flaw(got: list[str], expected: list[str]) -> str:
    known, there = set(expected), set(got)
    if there - known:
        return f"array {_short(next(n for n in got if n not in known))} is none of those sent"
    if known - there:
        return f"array {_short(next(n for n in expected if n not in there))} is missing"
    return "the arrays come in another order than they were sent"


def _array_flaw(name: str, expected: Expected, array: Array) -> str:
    most = expected.nbytes + HEADER_BYTES
    if len(array.data) > most:
        return f"array {_short(name)} has {len(array.data)} bytes, expected at most {most}"
    if array.stype != "numpy.ndarray":
        return f"array {_short(name)} is of type {_short(array.stype)}, expected 'numpy.ndarray'"
    if tuple(array.shape) != expected.shape:
        return _wrong_shape(name, expected, array.shape)
    return tensor_flaw(name, expected, array_of(name, array))


def tensor_flaw(name: str, expected: Expected, value: np.ndarray) -> str:
    """A tensor of another shape or dtype than ``expected``, or with NaN or infinity in it."""
    if value.shape != expected.shape:
        return _wrong_shape(name, expected, value.shape)
    if value.dtype.name not in expected.dtypes:
        return (
            f"array {_short(name)} is {value.dtype.name}, "
            f"expected {' or '.join(sorted(expected.dtypes))}"
        )
    if not np.isfinite(value).all():
        return f"array {_short(name)} holds NaN or infinity"
    return ""


def _wrong_shape(name: str, expected: Expected, shape: tuple[int, ...]) -> str:
    return f"array {_short(name)} has shape {str(shape)[:60]}, expected {expected.shape}"


def _first(flaws: Iterator[str]) -> str:
    return next((flaw for flaw in flaws if flaw), "")


def _short(name: str) -> str:
    return repr(name[:40])


Form = tuple[str, str, tuple[tuple[str, int], ...]]
"""How a reply names its records, and its metrics with their lengths (-1: a single number)."""


def form_of(content: RecordDict) -> Form:
    """What all replies of a round have to agree in for Flower to average them."""
    metrics = next(iter(content.metric_records.items()), ("", MetricRecord()))
    lengths = ((k, len(v) if isinstance(v, list) else -1) for k, v in metrics[1].items())
    return next(iter(content.array_records), ""), metrics[0], tuple(sorted(lengths))

"""Replies of which little changed, small and lossless: only what differs from what was sent.

Tensors are compared bit by bit, and decoding copies: it computes nothing, so what comes out is
what the client would have sent (NaN and -0.0 included). The container is a safetensors file.
Tensor ``i`` of those sent, of ``n`` entries, is in it as one of:

====================================  ==============================================
nothing                               it came back as it was sent
``i``                                 as it came back, when most of it changed
``i.values``, ``i.mask``              values ``[c]`` at the bits set in ``[ceil(n / 8)]``
                                      bytes, lowest bit first
``i.values``, ``i.gaps``              values ``[c]``, each after a gap of so many
                                      unchanged entries, uint8 or uint16; the highest
                                      number only skips so many entries
====================================  ==============================================

The smallest is taken, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fl_privacy.recording_format import STORABLE, Array, Arrays

ARRAY = "fl-privacy.sparse-update"
"""Name of the only array, uint8 ``[bytes]``, of a reply that is encoded this way."""

Part = Mapping[str, Array]
"""What changed in one tensor: ``{"": whole}``, or ``values`` with ``mask`` or ``gaps``."""

_KEY = re.compile(r"(0|[1-9][0-9]{0,8})(?:\.(values|mask|gaps))?")
_KINDS = ({""}, {"values", "mask"}, {"values", "gaps"})
_HEADER = 72
"""Bytes that the container needs for the name, type and place of one array, about."""


class SparseError(ValueError):
    """An encoded reply that does not say what changed; the message names the tensor."""


def encode(sent: Arrays, returned: Arrays) -> bytes | None:
    """What differs between ``returned`` and ``sent``; None where this format cannot say it.

    It can where names, their order and shapes agree, in any type that recordings can store.
    """
    arrays = {**sent, **returned}.values()
    if (
        list(sent) != list(returned)
        or any(sent[name].shape != array.shape for name, array in returned.items())
        or any(a.dtype.name not in STORABLE or not a.dtype.isnative for a in arrays)
    ):
        return None
    found = [_part(sent[name], array) for name, array in returned.items()]
    plain = {
        f"{i}.{kind}" if kind else f"{i}": np.asarray(array, order="C")
        for i, part in enumerate(found)
        for kind, array in part.items()
    }
    return bytes(save(plain))


def decode(sent: Arrays, data: bytes) -> dict[str, Array]:
    """What the client returned, from what it was sent and what `encode` made.

    Raises:
        SparseError: not such an encoding, or of other tensors.
    """
    parts = parse(data, [array.size for array in sent.values()])
    return {
        name: restore(array, parts.get(i, {}), name) for i, (name, array) in enumerate(sent.items())
    }


def parse(data: bytes, sizes: Sequence[int]) -> dict[int, Part]:
    """The parts by position among the tensors sent, whose numbers of entries are ``sizes``.

    What it allocates is bounded by the length of ``data``, and that by ``sizes``.

    Raises:
        SparseError: too long, no safetensors, or keys that mean nothing.
    """
    most = sum(8 * size + 4 * _HEADER for size in sizes) + _HEADER
    if len(data) > most:
        raise SparseError(f"{len(data)} bytes, expected at most {most} for the tensors sent")
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise SparseError(f"not a safetensors file ({error})") from error
    parts: dict[int, dict[str, Array]] = {}
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if match is None or int(match[1]) >= len(sizes):
            raise SparseError(f"key {key[:40]!r} is none of the {len(sizes)} tensors sent")
        parts.setdefault(int(match[1]), {})[match[2] or ""] = array
    for i, part in parts.items():
        if set(part) not in _KINDS:
            raise SparseError(f"tensor {i} has parts {sorted(part)}, which do not go together")
    return dict(parts)


def restore(sent: Array, part: Part, name: str) -> Array:
    """A tensor as the client returned it: a copy of ``sent`` with what ``part`` changes.

    Raises:
        SparseError: ``part`` does not fit ``sent``.
    """
    if not part:
        return sent.copy()
    if "" in part:
        whole = part[""]
        if whole.shape != sent.shape:
            raise SparseError(f"tensor {name!r}: expected shape {sent.shape}, got {whole.shape}")
        return whole.copy()
    values = part["values"]
    if values.dtype != sent.dtype:
        raise SparseError(f"tensor {name!r}: expected {sent.dtype} values, got {values.dtype}")
    where = (
        _of_mask(part["mask"], sent.size) if "mask" in part else _of_gaps(part["gaps"], sent.size)
    )
    if where is None or values.shape != where.shape:
        raise SparseError(f"tensor {name!r}: values and their places do not fit {sent.shape}")
    result = sent.flatten()
    result[where] = values
    return result.reshape(sent.shape)


def _part(old: Array, new: Array) -> Part:
    """The smallest way to say what changed in one tensor."""
    if old.dtype != new.dtype:
        return {"": new}
    changed = np.flatnonzero(_bits(old) != _bits(new))
    if not len(changed):
        return {}
    return min(_ways(new, changed), key=_bytes)


def _ways(new: Array, changed: NDArray[np.intp]) -> Iterator[Part]:
    yield {"": new}
    values = new.flatten()[changed]
    mask = np.zeros(new.size, dtype=bool)
    mask[changed] = True
    yield {"values": values, "mask": np.packbits(mask, bitorder="little")}
    if 8 * len(changed) < new.size:  # else the mask is smaller
        yield {"values": values, "gaps": _gaps(changed, np.dtype(np.uint8))}
        yield {"values": values, "gaps": _gaps(changed, np.dtype(np.uint16))}


def _bytes(part: Part) -> int:
    return sum(array.nbytes + _HEADER for array in part.values())


def _bits(array: Array) -> Array:
    return array.flatten().view(f"u{array.dtype.itemsize}")


def _gaps(places: NDArray[np.intp], dtype: np.dtype[np.unsignedinteger]) -> Array:
    """Unchanged entries before each of ``places``, which increase."""
    skip = int(np.iinfo(dtype).max)
    before = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(before // skip + 1) - 1
    gaps = np.full(ends[-1] + 1, skip, dtype)
    gaps[ends] = before % skip
    return gaps


def _of_gaps(gaps: Array, size: int) -> NDArray[np.intp] | None:
    """Places behind ``gaps``; None if these are none or lead beyond ``size`` entries."""
    # each leads at least one entry on: more of them than entries are not even unpacked
    if gaps.dtype not in (np.uint8, np.uint16) or gaps.ndim != 1 or len(gaps) > size:
        return None
    ends = gaps != (255 if gaps.dtype == np.uint8 else 65535)
    passed = np.cumsum(gaps.astype(np.int64) + ends)
    return None if len(passed) and passed[-1] > size else passed[ends] - 1


def _of_mask(mask: Array, size: int) -> NDArray[np.intp] | None:
    """Places of the bits set in ``mask``; None if it is not one of ``size`` bits."""
    if mask.dtype != np.uint8 or mask.shape != (-(-size // 8),):
        return None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), count=size, bitorder="little"))

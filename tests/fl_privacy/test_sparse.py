"""The encoding of sparse replies: bit for bit there and back, small, and safe to read."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fl_privacy.recording_format import STORABLE, Array, Arrays
from fl_privacy.sparse import SparseError, decode, encode, parse


def same(some: Arrays, others: Arrays) -> bool:
    """Equal in names, order, type, shape and every bit."""
    return list(some) == list(others) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(some.values(), others.values(), strict=True)
    )


def there_and_back(sent: Arrays, returned: Arrays) -> dict[str, Array]:
    data = encode(sent, returned)
    assert data is not None
    return decode(sent, data)


@st.composite
def bits_of(draw: st.DrawFn, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
    """Any bits of a type: for floats all kinds of NaN, infinities and negative zeros."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    return (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Arrays, Arrays]:
    """What was sent, and what came back: any entries changed to any bits."""
    sent, returned = dict[str, Array](), dict[str, Array]()
    for i in range(draw(st.integers(0, 4))):
        dtype = np.dtype(draw(st.sampled_from(sorted(STORABLE))))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        name = draw(st.sampled_from(["w", "0", "0.values", "__metadata__", ":"])) + str(i) * i
        sent[name], other = draw(bits_of(dtype, shape)), draw(bits_of(dtype, shape))
        rate, seed = draw(st.sampled_from([0.0, 0.01, 0.2, 1.0])), draw(st.integers(0, 99))
        changed = np.random.default_rng(seed).random(shape) < rate
        returned[name] = sent[name].copy()
        returned[name][changed] = other[changed]
    return sent, returned


@given(exchanges())
@settings(max_examples=150, deadline=None)
def test_what_comes_out_is_what_went_in_bit_for_bit(exchange: tuple[Arrays, Arrays]) -> None:
    sent, returned = exchange
    assert same(there_and_back(sent, returned), returned)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 254, 255, 256, 257, 509, 65_534, 65_537, 200_000])
def test_changes_at_every_distance_come_back(length: int) -> None:
    """One or two far changes: the gaps of both widths have to skip more than they can count."""
    sent = {"w": np.zeros(length, dtype=np.float32)}
    for places in ([0], [length - 1], [0, length - 1], [length // 2]):
        returned = {"w": sent["w"].copy()}
        returned["w"][places] = 1.0
        assert same(there_and_back(sent, returned), returned)


def test_negative_zero_and_nan_differ_from_zero_and_another_nan() -> None:
    for before, after in ((0x0000_0000, 0x8000_0000), (0x7FC0_0000, 0x7FC0_0001)):
        sent = {"w": np.full(1000, before, dtype=np.uint32).view(np.float32)}
        returned = {"w": sent["w"].copy()}
        returned["w"].view(np.uint32)[500] = after
        assert same(there_and_back(sent, returned), returned)
        assert len(encode(sent, returned) or b"") < 200


def test_integer_buffers_that_were_averaged_come_back_as_integers() -> None:
    """FedAvg sends them as float64; clients return int64."""
    sent = {"w": np.ones((2, 2), np.float32), "n": np.array(3.0)}
    returned = {"w": np.ones((2, 2), np.float32), "n": np.array(4)}
    assert same(there_and_back(sent, returned), returned)


def test_fortran_order_comes_back_with_the_same_values() -> None:
    sent = {"w": np.arange(12.0).reshape(3, 4)}
    returned = {"w": np.asfortranarray(sent["w"] * (np.arange(12).reshape(3, 4) % 5 > 0))}
    assert np.array_equal(there_and_back(sent, returned)["w"], returned["w"])


def size(rate: float, entries: int = 100_000) -> float:
    """Bytes a changed entry, beyond its four-byte value, when a share ``rate`` changed."""
    rng = np.random.default_rng(0)
    sent = rng.normal(size=entries).astype(np.float32)
    changed = rng.random(entries) < rate
    data = encode({"w": sent}, {"w": np.where(changed, -sent, sent)})
    assert data is not None
    return (len(data) - 4 * int(changed.sum())) / int(changed.sum())


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5])
def test_places_cost_at_most_twice_their_entropy(rate: float) -> None:
    """No code of independent places can do with less than the entropy."""
    entropy = -(rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate)) / rate / 8
    assert 0.95 * entropy < size(rate, 1_000_000) < 2 * entropy


def test_what_did_not_change_costs_nothing() -> None:
    sent = {f"layer{i}": np.ones((100, 100), np.float32) for i in range(50)}
    assert len(encode(sent, sent) or b"") <= 16


@pytest.mark.parametrize(
    "returned",
    [
        {"b": np.ones(2), "a": np.ones(2)},
        {"a": np.ones(2)},
        {"a": np.ones(2), "b": np.ones((2, 1))},
        {"a": np.ones(2), "b": np.ones(2, np.complex128)},
        {"a": np.ones(2), "b": np.ones(2, ">f8")},
    ],
    ids=["order", "names", "shape", "type", "byte order"],
)
def test_what_cannot_be_said_is_not_encoded(returned: Arrays) -> None:
    assert encode({"a": np.zeros(2), "b": np.zeros(2)}, returned) is None


SENT: Arrays = {"w": np.zeros((4, 4), np.float32), "b": np.zeros(3, np.float32)}


def parts(**arrays: Array) -> bytes:
    return bytes(save({key.replace("_", "."): value for key, value in arrays.items()}))


def f32(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


def u8(*values: int) -> Array:
    return np.array(values, dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 40, "not a safetensors file"),
        (parts(**{"0": f32(1)})[:-1], "not a safetensors file"),
        (parts(**{"0": np.zeros(10_000, np.float32)}), r"40\d\d\d bytes, expected at most"),
        (parts(**{"2": f32(1)}), "'2' is none of the 2 tensors sent"),
        (parts(**{"00": f32(1)}), "'00' is none"),
        (parts(w=f32(1)), "'w' is none"),
        (parts(**{"0_size": f32(1)}), r"'0\.size' is none"),
        (parts(**{"9" * 30: f32(1)}), "is none"),
        (parts(**{"0": f32(1), "0_mask": u8(1)}), "do not go together"),
        (parts(**{"0_values": f32(1)}), "do not go together"),
        (parts(**{"0_mask": u8(1, 0)}), "do not go together"),
        (parts(**{"1": f32(1, 2)}), r"'b': expected shape \(3,\), got \(2,\)"),
        (
            parts(**{"1_values": np.ones(1), "1_mask": u8(1)}),
            "expected float32 values, got float64",
        ),
        (parts(**{"1_values": f32(1, 2), "1_mask": u8(1)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_mask": u8(1, 0)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_mask": np.ones(1, np.int8)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_gaps": u8(3)}), "do not fit"),
        (parts(**{"1_values": f32(1, 2), "1_gaps": u8(0, 2)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_gaps": u8(255, 0)}), "do not fit"),
        (parts(**{"1_values": f32(1, 1), "1_gaps": u8(0)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_gaps": u8(0, 0, 0, 0)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_gaps": np.zeros(1, np.uint32)}), "do not fit"),
        (parts(**{"1_values": f32(1), "1_gaps": np.zeros((1, 1), np.uint8)}), "do not fit"),
        (parts(**{"1_values": np.ones((1, 1), np.float32), "1_mask": u8(1)}), "do not fit"),
    ],
)
def test_a_malformed_encoding_says_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(SparseError, match=reason):
        decode(SENT, data)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        header(b'{"0":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}'),
        header(b'{"0":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}'),
        header(b'{"0":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}') + b"ab",
        header(b'{"0":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}') + b"a",
        header(b"[" * 400),
        header(b'{"0":3}'),
        (2**63).to_bytes(8, "little"),
        (2**40).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_header_that_claims_too_much_is_refused_not_believed(data: bytes) -> None:
    with pytest.raises(SparseError):
        decode(SENT, data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_change_of_the_bytes_is_read_or_refused(data: st.DataObject) -> None:
    """Never another error, and never tensors of other shapes."""
    returned = {"w": SENT["w"].copy(), "b": f32(1, 0, 2)}
    returned["w"][1, ::2] = 3
    good = bytearray(encode(SENT, returned) or b"")
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        decoded = decode(SENT, bytes(good[:cut]))
    except SparseError:
        return
    assert {n: a.shape for n, a in decoded.items()} == {n: a.shape for n, a in SENT.items()}


def test_reading_takes_a_small_multiple_of_the_bytes_that_arrived() -> None:
    """Numbers of places as large as can be: nothing is unpacked that cannot fit."""
    sent = {"w": np.zeros(1_000_000, np.float32)}
    data = parts(**{"0_values": f32(1), "0_gaps": np.zeros(7_900_000, np.uint8)})
    tracemalloc.start()
    with pytest.raises(SparseError, match="do not fit"):
        decode(sent, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(data)


def test_decoding_leaves_what_was_sent_alone() -> None:
    sent = {"w": np.zeros(50, np.float32), "b": np.zeros(2, np.float32)}
    returned = {"w": sent["w"] + (np.arange(50) == 7), "b": sent["b"]}
    out = there_and_back(sent, {n: a.astype(np.float32) for n, a in returned.items()})
    out["b"][:] = 5
    assert not sent["w"].any()
    assert not sent["b"].any()


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        (lambda n: n >= 0, {"0"}),
        (lambda n: n % 3 == 0, {"0.values", "0.mask"}),
        (lambda n: n % 50 == 0, {"0.values", "0.gaps"}),
        (lambda n: n < 0, set[str]()),
    ],
    ids=["all", "a third", "few", "none"],
)
def test_the_smallest_way_is_taken(changed: Callable[[Array], Array], kinds: set[str]) -> None:
    sent = np.zeros(10_000, np.float32)
    data = encode({"w": sent}, {"w": changed(np.arange(10_000)).astype(np.float32)})
    assert data is not None
    assert set(load(data)) == kinds
    assert set(parse(data, [10_000])) == ({0} if kinds else set())

"""Derived seeds: stable across processes, distinct between purposes."""

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_privacy.seeding import derive_seed, generator

PARTS = st.lists(st.integers(-(2**40), 2**40) | st.text(max_size=8), max_size=4)


@given(PARTS, PARTS)
def test_seeds_are_63_bit_and_differ_whenever_the_parts_do(
    a: list[int | str], b: list[int | str]
) -> None:
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_types_and_boundaries_count() -> None:
    assert len({derive_seed(1, "2"), derive_seed("1", 2), derive_seed("12"), derive_seed(12)}) == 4


def test_another_process_derives_the_same() -> None:
    code = "from fl_privacy.seeding import derive_seed; print(derive_seed(1, 'x'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(other.stdout) == derive_seed(1, "x")


def test_a_generator_starts_anew_each_time() -> None:
    first, again = (torch.rand(3, generator=generator(0, "a")) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "b")))

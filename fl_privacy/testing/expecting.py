"""What conformance checks expect, and how they see that nothing else has changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fl_privacy.types import Tensors

T = TypeVar("T")


def expect(condition: bool, message: str) -> None:
    """Fail with ``message`` unless it is so; also where Python leaves out assertions."""
    if not condition:
        raise AssertionError(message)


def unchanged_random_state(call: Callable[[], T]) -> T:
    """What ``call`` returns, if it left the global random states as they were."""
    before = _random_states()
    result = call()
    expect(
        before == _random_states(),
        "a global random state was used (torch, numpy or random); draw from a generator",
    )
    return result


def _random_states() -> tuple[bytes, str, str]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch_state = bytes(torch.random.get_rng_state().numpy())
    return torch_state, str(numpy_state), str(random.getstate())


def copied(tensors: Tensors) -> dict[str, Tensor]:
    """Copies, to see later whether somebody wrote into the tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_tensors(a: Tensors, b: Tensors) -> bool:
    """Whether names, their order, and all values are equal."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)

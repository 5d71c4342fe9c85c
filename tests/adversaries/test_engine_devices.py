"""Every tensor an attack makes is on the attack's device, and nothing waits for that device.

PyTorch's meta device stands in for an accelerator: its tensors hold no values, so mixing them with
others raises, and so does reading one back (``.item()``, ``if tensor``).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from adversaries.gradient_matching import GradientMatching, Problem
from adversaries.matching import Chunk, attack_chunks, make_batch
from fl_privacy import component
from fl_privacy.component import installed
from fl_privacy.testing import toy_observations
from fl_privacy.testing.toys import TASK
from fl_privacy.types import Failure, Reconstruction

META = torch.device("meta")
BUILT_IN = [component.create("adversaries", name) for name in sorted(installed("adversaries"))]
MATCHING = [attack for attack in BUILT_IN if isinstance(attack, GradientMatching)]


def chunk_for(attack: GradientMatching) -> Chunk:
    """Three toy targets as the engine hands them to ``attack``."""
    chunks: list[Chunk] = []

    def keep(chunk: Chunk) -> list[Reconstruction | Failure]:
        chunks.append(chunk)
        return []

    with pytest.raises(ValueError, match="zip"):  # nothing was solved
        list(attack_chunks(toy_observations(3)[0], 3, keep, attack.prepare))
    return chunks[0]


@pytest.mark.parametrize("attack", MATCHING, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_attack_stays_on_its_device_and_never_waits(
    attack: GradientMatching, dtype: torch.dtype
) -> None:
    attack = attack.model_copy(update={"iterations": 2, "tv": 0.1, "nonzero": True})
    batch = make_batch(chunk_for(attack), restarts=1, lanes=4, device=META, dtype=dtype)

    def draw(shape: tuple[int, ...], _stream: str) -> Tensor:
        return torch.empty(4, *shape, device=META, dtype=dtype)

    seen = (attack.scale(batch.observed), batch.statistics)
    problem = Problem(batch, seen, partial(attack.objective, batch), draw)
    found = attack.optimize(problem, draw((1, *TASK.input_shape), ""), lambda *_: None)
    assert found.inputs.shape == (4, 1, *TASK.input_shape)
    assert {t.device.type for t in (found.inputs, found.labels, found.losses)} == {"meta"}
    assert {found.inputs.dtype, found.losses.dtype} == {dtype}


def test_the_stand_in_notices_what_an_accelerator_would() -> None:
    there = torch.ones(3, device=META)
    with pytest.raises(RuntimeError):
        there.tolist()
    with pytest.raises(RuntimeError):
        there + torch.ones(3)

"""A replayed step computes the bits of the step it was traced from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adversaries import replay
from adversaries.dlg import DLG
from adversaries.gradient_matching import GradientMatching
from adversaries.gradient_similarity import GradientSimilarity
from fl_privacy.types import LocalTraining, Observation, Reconstruction, Task

TASK = Task(input_shape=(1, 8, 8), classes=4, mean=(0.0,), std=(1.0,))
LOCAL = LocalTraining(algorithm="fedavg", lr=0.1, epochs=2, batch_size=2)


def network() -> nn.Module:
    """Convolution, batch norm, pooling, dense layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


@pytest.mark.parametrize(
    "attack",
    [
        GradientSimilarity(iterations=4),
        GradientSimilarity(iterations=4, restarts=2),
        DLG(iterations=2),
    ],
)
def test_replayed_and_composed_attacks_agree_bit_for_bit(
    observe: Callable[..., list[Observation]],
    monkeypatch: pytest.MonkeyPatch,
    attack: GradientMatching,
) -> None:
    inputs = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = observe(network, TASK, inputs, images=3, training=LOCAL)

    def answers() -> Tensor:
        results = attack.attack(targets, seed=0, device=torch.device("cpu"))
        return torch.stack([r.inputs for r in results if isinstance(r, Reconstruction)])

    monkeypatch.setattr(replay, "WORTHWHILE", 10**9)
    composed = answers()
    monkeypatch.setattr(replay, "WORTHWHILE", 1)
    assert torch.equal(answers(), composed)


def test_a_replayed_step_runs_no_python_of_the_network() -> None:
    calls = 0

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return 2 * x, x.square().sum(1)

    x = torch.ones(3, 2)
    replayed = replay.replayable(step, x, calls=replay.WORTHWHILE)
    for value in (x, 3 * x):
        slope, loss = replayed(value)
        assert torch.equal(slope, 2 * value)
        assert torch.equal(loss, value.square().sum(1))
    assert calls == 1
    assert replay.replayable(step, x, calls=replay.WORTHWHILE - 1) is step

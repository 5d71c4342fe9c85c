"""Small networks in float64, recorded, and samples for them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, Observation, Samples, Task

TASK = Task(input_shape=(2, 6, 6), classes=3, mean=(0.4, 0.6), std=(0.3, 0.2))


def dense(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, classes, bias=False)
    )


def rectified(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, classes))


def convolutions(classes: int = 3) -> nn.Module:
    """Stride, dilation, groups, no padding, activations that work in place, batch norm."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (2, 1), groups=2, padding=(1, 0), bias=False),
        nn.BatchNorm2d(4),
        nn.Sigmoid(),
        nn.Conv2d(4, 2, 2, dilation=2),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


class Odd(nn.Module):
    """Layers that are no plain product: padding by name, run twice, shared, used by function."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, 2, 3, padding="same")
        self.rows = nn.Linear(6, 3)
        self.twice = nn.Linear(3, 3)
        self.shared = nn.Linear(3, 3)
        self.sharing = nn.Linear(3, 3)
        self.sharing.weight = self.shared.weight
        self.used = nn.Linear(36, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(inputs))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(self.rows(hidden)))))
        hidden = self.sharing(torch.tanh(self.shared(hidden))).flatten(1)
        outputs: Tensor = self.used(hidden) + F.linear(hidden.square(), self.used.weight)
        return outputs


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "dense": dense,
    "rectified": rectified,
    "convolutions": convolutions,
    "odd": Odd,
}


def make(kind: str, classes: int = 3) -> nn.Module:
    """A network in float64 whose weights are its own seed's; batch norm has seen something."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model = KINDS[kind](classes).double()
        with torch.no_grad():
            model(torch.randn(16, 2, 6, 6, dtype=torch.float64))
    return model.eval()


def observe(*models: nn.Module, task: Task = TASK) -> list[Observation]:
    """One observation for each of these global models."""

    def sent(number: int, model: nn.Module) -> Exchange:
        parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return Exchange(1, number, "0", 1, f"r{number}", f"g{number}", parameters, buffers, {}, {})

    first = deepcopy(models[0])
    return [Observation(str(i), (sent(i, m),), lambda: first, task) for i, m in enumerate(models)]


def draw(n: int = 5, task: Task = TASK) -> Samples:
    inputs = torch.rand(n, *task.input_shape, generator=generator(0, "inputs"))
    return Samples(inputs.double(), torch.arange(n) % task.classes)


@pytest.fixture
def task() -> Task:
    """Images of two channels, three classes."""
    return TASK


@pytest.fixture
def made() -> Callable[..., nn.Module]:
    """What makes a network: ``made(kind, classes=3)``; a kind of `KINDS`."""
    return make


@pytest.fixture
def observed() -> Callable[..., list[Observation]]:
    """What makes an observation of each global model: ``observed(*models, task=...)``."""
    return observe


@pytest.fixture
def samples() -> Callable[..., Samples]:
    """What draws samples: ``samples(n=5, task=TASK)``."""
    return draw


@pytest.fixture
def silenced() -> tuple[nn.Module, Samples, Tensor]:
    """A network none of whose units the first of four samples activates; which samples do."""
    model, data = make("rectified"), draw(4)
    first = model.get_submodule("1")
    with torch.no_grad():
        seen = TASK.normalize(data.inputs).flatten(1)
        model.get_parameter("1.bias").sub_(first(seen)[0].max() + 1e-3)
        others = first(seen).amax(1) > 0
    assert not others[0]
    assert others.any()
    return model, data, others

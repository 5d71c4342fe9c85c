"""What was seen, in gradient units."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adversaries.local_steps import skeleton
from adversaries.targets import prepare
from fl_privacy.types import LocalTraining, Observation, Task

TASK = Task(input_shape=(1, 6), classes=3, mean=(0.0,), std=(1.0,))


def network() -> nn.Module:
    """A dense network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_equal_steps_taken_for_one_give_the_loss_gradient(
    observe: Callable[..., list[Observation]], momentum: float, decay: float
) -> None:
    """With a small learning rate all local steps have the same gradient: that of the loss."""
    training = LocalTraining(
        algorithm="fedavg", lr=1e-4, epochs=4, batch_size=5, momentum=momentum, weight_decay=decay
    )
    inputs = torch.rand(5, 1, 6, generator=torch.Generator().manual_seed(1))
    (observation,) = observe(network, TASK, inputs, images=5, training=training)
    model = network()
    loss = F.cross_entropy(model(TASK.normalize(inputs)), torch.arange(5) % 3)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    (seen,) = prepare(observation, skeleton(model, training), unrolled=False).observed
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        assert torch.allclose(seen[name].float(), gradient, atol=3e-3), name

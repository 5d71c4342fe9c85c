"""Networks as people bring them: what can be attacked, and what the refusal of the rest says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from adversaries.differentiability import check_differentiable
from adversaries.gradient_similarity import GradientSimilarity
from adversaries.local_steps import skeleton
from adversaries.targets import Unattackable
from fl_privacy.types import LocalTraining, Observation, Reconstruction, Task

TASK = Task(input_shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
CPU = torch.device("cpu")
Observe = Callable[..., list[Observation]]


class Transformer(nn.Module):
    """Patches, two encoder layers, and attention once more as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.patches(x).flatten(2).mT)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        head: Tensor = self.head(mixed.mean(1))
        return head


class Dense(nn.Module):
    """A dense layer, a function, and the output; ``step`` names where the function acts."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.step = nn.Linear(3072, 8), Applied(function)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.step(self.first(x.flatten(1))))
        return last


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.memory, self.head = kind(96, 8, batch_first=True), nn.Linear(8, 10)  # type: ignore[call-arg, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.memory(x.transpose(1, 2).flatten(2))[0][:, -1])
        return head


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return build()

    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.resnet18(num_classes=10),
        lambda: models.mobilenet_v3_small(num_classes=10),
        Transformer,
    ],
    ids=["in-place ReLU and batch norm", "hardswish and hardsigmoid", "attention"],
)
def test_gradient_similarity_runs_and_sees_no_distance_at_the_truth(
    build: Callable[[], nn.Module], observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eval mode, so that one image suffices; at the truth the objective is zero.

    (That of an untrained MobileNet is nearly so everywhere: its features hardly depend on the
    image.)
    """
    training = LocalTraining(lr=1.0, batch_norm="eval")
    network = seeded(lambda: build().eval())
    truth = torch.rand(1, *TASK.input_shape, generator=torch.Generator().manual_seed(1))
    targets = observe(network, TASK, truth, training=training)
    attack = GradientSimilarity(iterations=3, tv=0.0)
    (blind,) = attack.attack(targets, seed=0, device=CPU)
    monkeypatch.setattr(
        "adversaries.gradient_matching.lane_draws",
        lambda *_, lanes, **__: TASK.normalize(truth).expand(lanes, *truth.shape),
    )
    (told,) = attack.model_copy(update={"iterations": 1, "lr": 1e-9}).attack(
        targets, seed=0, device=CPU
    )
    assert isinstance(blind, Reconstruction) and isinstance(told, Reconstruction)
    assert told.loss < 1e-4
    assert blind.loss > -1e-4 and blind.inputs.shape == told.inputs.shape


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu_().mul(2).add_(1),
        lambda x: F.dropout(x, training=False),
    ],
    ids=["F.relu", "methods", "F.dropout"],
)
def test_in_place_operations_on_what_is_passing_by_are_fine(
    function: Callable[[Tensor], Tensor],
) -> None:
    check_differentiable(skeleton(Dense(function), LocalTraining()), TASK)


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (F.hardsigmoid, "no second derivative: use an equivalent"),
        (F.dropout, "training=self.training"),
        (lambda x: x if x.sum() > 0 else -x, "torch.where instead of if"),
        (lambda x: x * x.max().item(), "no .item()"),
    ],
    ids=["hardsigmoid", "dropout", "if", "item"],
)
def test_the_innermost_module_is_named_with_what_to_change(
    function: Callable[[Tensor], Tensor], remedy: str
) -> None:
    with pytest.raises(Unattackable) as refusal:
        check_differentiable(skeleton(Dense(function), LocalTraining()), TASK)
    assert "through step (Applied): " in str(refusal.value)
    assert remedy in str(refusal.value)


def test_lstm_can_be_attacked_and_gru_is_refused_with_what_can() -> None:
    check_differentiable(skeleton(Recurrent(nn.LSTM), LocalTraining()), TASK)
    with pytest.raises(Unattackable, match=r"memory \(GRU\).*nn\.LSTM.*nn\.GRUCell"):
        check_differentiable(skeleton(Recurrent(nn.GRU), LocalTraining()), TASK)


def test_a_network_that_does_not_run_is_blamed_where_it_stops() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(7, 7)), nn.Linear(7, 10))
    with pytest.raises(Unattackable, match=r"does not run on .*1\.0 \(Linear\).*input_shape"):
        check_differentiable(skeleton(model, LocalTraining()), TASK)


def test_the_network_s_own_forward_is_named_when_no_layer_is_to_blame() -> None:
    class Own(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            return F.hardsigmoid(super().forward(x))

    with pytest.raises(Unattackable, match=r"the network itself \(Own\.forward\)"):
        check_differentiable(skeleton(Own(nn.LSTM), LocalTraining()), TASK)

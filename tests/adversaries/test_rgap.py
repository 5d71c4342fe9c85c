"""R-GAP against theory: exact where the layers' systems are determined, refused elsewhere."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adversaries.layer_inversion import INVERSES, inverse, least_squares, system
from adversaries.rgap import RGAP
from adversaries.tracing import Link
from fl_privacy import component
from fl_privacy.testing import check_adversary
from fl_privacy.types import Failure, LocalTraining, Observation, Reconstruction, Task

Observe = Callable[..., list[Observation]]
CPU = torch.device("cpu")


def task_of(*shape: int) -> Task:
    return Task(input_shape=shape, classes=10, mean=(0.3,) * shape[0], std=(0.35,) * shape[0])


def pictures(count: int, task: Task) -> Tensor:
    return torch.rand(count, *task.input_shape, generator=torch.Generator().manual_seed(1))


GREY = task_of(1, 8, 8)


def built(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same network at each call."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


def small(activation: Callable[[], nn.Module], channels: int = 8) -> Callable[[], nn.Module]:
    """Two strided convolutions and two dense layers for `GREY`."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            activation(),
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            activation(),
            nn.Flatten(),
            nn.Linear(64, 32),
            activation(),
            nn.Linear(32, 10),
        )
    )


def errors(observations: list[Observation], inputs: Tensor) -> list[float]:
    results = list(RGAP().attack(observations, seed=0, device=CPU))
    assert all(isinstance(r, Reconstruction) for r in results), results
    return [
        float((r.inputs - truth).abs().max())
        for r, truth in zip(results, inputs, strict=True)
        if isinstance(r, Reconstruction)
    ]


def reason(observation: Observation, **settings: int) -> str:
    (result,) = RGAP(**settings).attack([observation], seed=0, device=CPU)
    assert isinstance(result, Failure)
    return result.reason


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Identity])
def test_small_convolutional_networks_give_their_image(
    observe: Observe, activation: Callable[[], nn.Module]
) -> None:
    inputs = pictures(2, GREY)
    training = LocalTraining(lr=0.5, weight_decay=0.01)
    observations = observe(small(activation), GREY, inputs, training=training)
    assert max(errors(observations, inputs)) < 1e-4


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_lenet_is_determined(observe: Observe, shape: tuple[int, ...]) -> None:
    task = task_of(*shape)
    inputs = pictures(1, task)
    model = component.create("models", "lenet-zhu")
    training = LocalTraining(lr=0.1)
    observations = observe(lambda: model.build(task, seed=0), task, inputs, training=training)
    assert max(errors(observations, inputs)) < 1e-3


def test_signals_and_dense_layers_without_bias(observe: Observe) -> None:
    task = task_of(2, 20)
    model = built(
        lambda: nn.Sequential(
            nn.Conv1d(2, 8, 5, padding=2, padding_mode="circular"),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(160, 24, bias=False),
            nn.Tanh(),
            nn.Linear(24, 10),
        )
    )
    inputs = pictures(1, task)
    assert max(errors(observe(model, task, inputs), inputs)) < 1e-4


def test_an_underdetermined_layer_is_refused_with_its_rank(observe: Observe) -> None:
    """32 outputs and 18 weights, less the 4 products of 2 channels that both blocks state:

    ``<dL/dz_i, W_j x> = <W_j, dL/dW_i>``.
    """
    (narrow,) = observe(small(nn.Tanh, channels=2), GREY, pictures(1, GREY))
    message = "input of 0 (Conv2d) is not determined: its equations have rank 46 for 64 unknowns"
    assert message in reason(narrow)
    (observation,) = observe(small(nn.Tanh), GREY, pictures(1, GREY))
    message = "input of 2 (Conv2d) has 128 unknowns: expected at most 127"
    assert message in reason(observation, most_unknowns=127)


def test_a_withheld_convolution_leaves_its_outputs(observe: Observe) -> None:
    inputs = pictures(1, GREY)
    observations = observe(small(nn.Tanh), GREY, inputs)
    hidden = [replace(o, withheld=("0.weight", "0.bias")) for o in observations]
    assert max(errors(hidden, inputs)) < 1e-4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense((x + self.conv(x)).flatten(1))
        return out


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(self.conv(self.conv(x)).flatten(1))
        return out


def pooled() -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small(nn.ReLU), "3 (ReLU) cannot be inverted"),
        (
            built(lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10))),
            "0 (MaxPool2d) cannot be inverted",
        ),
        (small(lambda: nn.LeakyReLU(0.0)), "3 (LeakyReLU) cannot be inverted"),
        (built(Residual), "acts before dense (Linear)"),
        (built(Repeated), "conv (Conv2d) runs more than once"),
        (built(lambda: nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())), "nowhere to start"),
    ],
)
def test_networks_that_cannot_be_inverted_are_refused_by_name(
    observe: Observe, model: Callable[[], nn.Module], message: str
) -> None:
    assert message in reason(observe(model, GREY, pictures(1, GREY))[0])


def test_batches_and_several_steps_are_refused(observe: Observe) -> None:
    pairs = LocalTraining(lr=0.5, batch_size=2)
    (batch,) = observe(small(nn.Tanh), GREY, pictures(2, GREY), images=2, training=pairs)
    assert "holds 2 images" in reason(batch)
    epochs = LocalTraining(algorithm="fedavg", lr=0.5, epochs=3)
    (several,) = observe(small(nn.Tanh), GREY, pictures(1, GREY), training=epochs)
    assert "took 3 local steps" in reason(several)


def test_noise_makes_the_equations_disagree_and_the_outcome_says_so(observe: Observe) -> None:
    (observation,) = observe(small(nn.Tanh), GREY, pictures(1, GREY))
    (exchange,) = observation.exchanges
    noise = torch.Generator().manual_seed(0)
    noisy = {
        n: u + 0.02 * torch.randn(u.shape, generator=noise) for n, u in exchange.update.items()
    }
    spoiled = replace(observation, exchanges=(replace(exchange, update=noisy),))
    clean, bad = RGAP().attack([observation, spoiled], seed=0, device=CPU)
    assert isinstance(clean, Reconstruction)
    assert isinstance(bad, Reconstruction)
    assert (clean.outcome.status, bad.outcome.status) == ("completed", "partial")
    assert "noise" in bad.outcome.message
    assert clean.loss < 1e-4 < 0.01 < bad.loss


@pytest.mark.parametrize("layer", [kind() for kind in INVERSES], ids=str)
def test_inverses_undo_their_layers(layer: nn.Module) -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(inverse(Link("", layer, (13,)), layer(x[None])[0]), x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1, dtype=torch.float64),
        nn.Conv2d(2, 4, 3, groups=2, dilation=2, dtype=torch.float64),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", dtype=torch.float64),
    ],
    ids=str,
)
def test_the_system_holds_at_the_truth(layer: nn.Module) -> None:
    """Against `torch.autograd` for an arbitrary slope."""
    link = Link("", layer, (2, 6, 6))
    x = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    z = layer(x)
    slope = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((z * slope).sum(), [layer.get_parameter("weight")])
    with torch.no_grad():
        trust = torch.rand(z.numel(), dtype=torch.float64)
        matrix, right = system(link, z.detach().flatten(), trust, slope.flatten(), gradient)
    torch.testing.assert_close(matrix @ x.flatten(), right)


def test_least_squares_tells_the_rank() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, 1e-9], dtype=torch.float64))
    solution = least_squares(matrix, torch.ones(3, dtype=torch.float64), 1e-7)
    assert solution.rank == 2
    torch.testing.assert_close(solution.values[:2], torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_conformance() -> None:
    check_adversary(RGAP())

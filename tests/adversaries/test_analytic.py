"""A dense layer gives its input away: exactly, wherever it stands, whatever the steps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adversaries.analytic import Analytic, layer_input
from adversaries.targets import Unattackable, prepare
from adversaries.tracing import dense_inputs
from fl_privacy.types import Failure, LocalTraining, Observation, Reconstruction, Task

Observe = Callable[..., list[Observation]]
CPU = torch.device("cpu")
TASK = Task(input_shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.35,))


def pictures(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def mlp(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Flatten()]
        width = 64
        for hidden in widths:
            layers += [nn.Linear(width, hidden), activation()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, 10))


def found(observations: list[Observation]) -> list[Tensor]:
    results = list(Analytic().attack(observations, seed=0, device=CPU))
    assert all(isinstance(r, Reconstruction) for r in results), results
    return [r.inputs for r in results if isinstance(r, Reconstruction)]


def reason(observation: Observation) -> str:
    (result,) = Analytic().attack([observation], seed=0, device=CPU)
    assert isinstance(result, Failure)
    return result.reason


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize("widths", [(16,), (256,), (64, 32), (128, 64, 32, 16)])
def test_every_dense_network_gives_its_input_to_five_digits(
    observe: Observe, widths: tuple[int, ...], activation: type[nn.Module]
) -> None:
    inputs = pictures(6)
    for image, truth in zip(
        found(observe(lambda: mlp(widths, activation), TASK, inputs)), inputs, strict=True
    ):
        assert (image - truth).abs().max() < 1e-5


def test_all_rows_together_err_less_than_the_largest(observe: Observe) -> None:
    inputs = pictures(6)
    observations = observe(lambda: mlp((256,), nn.Tanh), TASK, inputs)
    errors = []
    for observation, truth in zip(observations, inputs, strict=True):
        gradient = prepare(observation, mlp((256,), nn.Tanh)).observed[0]
        weight, bias = gradient["1.weight"], gradient["1.bias"]
        row, x = bias.abs().argmax(), TASK.normalize(truth).flatten().double()
        together, alone = layer_input(weight, bias), weight[row] / bias[row]
        errors.append(((together - x).norm(), (alone - x).norm()))
    assert all(together < 0.5 * alone for together, alone in errors)


def test_layer_input_is_float64_and_exact_and_refuses_zeros() -> None:
    x, bias = torch.randn(7, dtype=torch.float64), torch.tensor([0.0, 2.0, -1e-3])
    torch.testing.assert_close(layer_input(bias.double()[:, None] * x, bias), x)
    with pytest.raises(Unattackable, match="zero everywhere"):
        layer_input(torch.zeros(3, 7), torch.zeros(3))


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_several_local_steps_and_linked_rounds_give_the_same_image(
    observe: Observe, momentum: float, decay: float
) -> None:
    training = LocalTraining(
        algorithm="fedavg", lr=0.5, epochs=4, momentum=momentum, weight_decay=decay
    )
    inputs = pictures(2)
    observations = observe(lambda: mlp((32,), nn.ReLU), TASK, inputs, training=training)
    linked = [replace(o, exchanges=o.exchanges * 2) for o in observations]
    for image, truth in zip(found([*observations, *linked]), [*inputs, *inputs], strict=True):
        assert (image - truth).abs().max() < 1e-5


class Branches(nn.Module):
    """The layer that sees the image is the last in name order and runs after another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.narrow = nn.Linear(72, 16)
        self.head = nn.Linear(32, 10)
        self.wide = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        features = self.narrow(self.conv(x).flatten(1)).sigmoid()
        out: Tensor = self.head(torch.cat([features, self.wide(x.flatten(1)).sigmoid()], 1))
        return out


def branches() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches()


def test_the_layer_is_found_by_what_it_sees_not_by_its_place(observe: Observe) -> None:
    inputs = pictures(2)
    for image, truth in zip(found(observe(branches, TASK, inputs)), inputs, strict=True):
        assert (image - truth).abs().max() < 1e-5


def test_dense_inputs_leaves_out_layers_that_mix_positions_or_run_twice() -> None:
    twice, rows = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(rows, nn.Flatten(), nn.Linear(64, 8), twice, twice)
    assert list(dense_inputs(model, {}, torch.rand(3, 8, 8))) == ["2"]


def test_refusals_name_the_layer_and_the_reason(observe: Observe) -> None:
    pairs = LocalTraining(lr=1.0, batch_size=2)
    (batch,) = observe(lambda: mlp((32,), nn.ReLU), TASK, pictures(2), images=2, training=pairs)
    assert "holds 2 images and a row of 1.weight mixes them" in reason(batch)
    (one,) = observe(lambda: mlp((32,), nn.ReLU), TASK, pictures(1))
    assert "the gradient of 1 is withheld" in reason(replace(one, withheld=("1.bias",)))
    (exchange,) = one.exchanges
    silent = {n: u * (n != "1.bias") for n, u in exchange.update.items()}
    blind = replace(one, exchanges=(replace(exchange, update=silent),))
    assert "bias gradient of the dense layer is zero everywhere" in reason(blind)

    def biasless() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.Linear(8, 10))

    torch.manual_seed(0)
    assert "first layer with weights is 1 (Linear)" in reason(
        observe(biasless, TASK, pictures(1))[0]
    )

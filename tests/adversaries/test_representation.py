"""Matching the representation: zero loss at the truth, recovery, refusals."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from adversaries.local_steps import skeleton
from adversaries.matching import Chunk, make_batch
from adversaries.representation import RepresentationMatching
from fl_privacy import component
from fl_privacy.testing import check_adversary
from fl_privacy.types import Failure, LocalTraining, Observation, Reconstruction, Task

Observe = Callable[..., list[Observation]]
CPU = torch.device("cpu")
TASK = Task(input_shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.35,))
RAMP = torch.linspace(0, 1, 64).view(1, 1, 8, 8)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.Sigmoid(),
            nn.Linear(32, 10),
        )


def dense() -> nn.Module:
    model: nn.Module = component.create("models", "mlp(hidden=(64,))").build(TASK, seed=0)
    return model


def pixels(attack: RepresentationMatching, observations: list[Observation]) -> list[Tensor]:
    results = list(attack.attack(observations, seed=0, device=CPU))
    assert all(isinstance(r, Reconstruction) for r in results), results
    return [r.inputs for r in results if isinstance(r, Reconstruction)]


def reason(observation: Observation, attack: RepresentationMatching) -> str:
    (result,) = attack.attack([observation], seed=0, device=CPU)
    assert isinstance(result, Failure)
    return result.reason


@pytest.mark.parametrize("layer", ["", "3", "5"])
@pytest.mark.parametrize("nonzero", [False, True])
def test_the_objective_and_its_gradient_vanish_at_the_truth(
    observe: Observe, layer: str, nonzero: bool
) -> None:
    inputs = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    observations = observe(network, TASK, inputs, training=LocalTraining(lr=1.0, weight_decay=0.01))
    attack = RepresentationMatching(tv=0.0, layer=layer, nonzero=nonzero)
    training = observations[0].local_training
    assert training is not None
    model = skeleton(network(), training)
    targets = tuple(attack.prepare(o, model) for o in observations)
    chunk = Chunk(model, observations[0], targets, 0)
    batch = make_batch(chunk, lanes=2, restarts=1, device=CPU, dtype=torch.float64)

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        seen = (attack.scale(batch.observed), batch.statistics)
        objective = partial(attack.objective, batch)
        slope, loss = vmap(grad_and_value(objective))(x, batch.labels, seen)
        return slope, loss

    truth = TASK.normalize(inputs).double()[:, None]
    slope, loss = slopes(truth)
    far, away = slopes(truth + 0.5 * torch.randn(truth.shape, dtype=torch.float64))
    assert loss.max() < 1e-10 < 1e-6 < away.min()
    assert slope.norm() < 1e-3 * far.norm()


@pytest.mark.parametrize("model", [network, dense])
def test_it_recovers_a_small_picture(observe: Observe, model: Callable[[], nn.Module]) -> None:
    attack = RepresentationMatching(iterations=300)
    (found,) = pixels(attack, observe(model, TASK, RAMP))
    assert (found - RAMP).square().mean() < 1e-3


def test_only_the_chosen_layer_counts(observe: Observe) -> None:
    """Replacing the gradients of all other layers by noise changes nothing."""
    observations = observe(network, TASK, RAMP)
    (exchange,) = observations[0].exchanges

    def noisy(u: Tensor) -> Tensor:
        return u + torch.randn(u.shape, generator=torch.Generator().manual_seed(0))

    update = {n: u if n.startswith("3.") else noisy(u) for n, u in exchange.update.items()}
    spoiled = replace(observations[0], exchanges=(replace(exchange, update=update),))
    attack = RepresentationMatching(iterations=5)
    assert torch.equal(*pixels(attack, [observations[0], spoiled]))
    other = RepresentationMatching(iterations=5, layer="5")
    assert not torch.equal(*pixels(other, [observations[0], spoiled]))


def test_with_nonzero_pruned_entries_do_not_count(observe: Observe) -> None:
    """Soteria zeroes columns of the layer's weight gradient."""
    (observation,) = observe(network, TASK, RAMP)
    (exchange,) = observation.exchanges
    update = {n: u.clone() for n, u in exchange.update.items()}
    update["3.weight"][:, ::3] = 0
    pruned = replace(observation, exchanges=(replace(exchange, update=update),))
    aware, naive = (
        pixels(RepresentationMatching(iterations=300, nonzero=nonzero), [pruned])[0]
        for nonzero in (True, False)
    )
    assert (aware - RAMP).square().mean() < 1e-3
    assert (aware - RAMP).square().mean() < 0.2 * (naive - RAMP).square().mean()


def test_refusals_list_what_there_is(observe: Observe) -> None:
    attack = RepresentationMatching(iterations=2)
    (one,) = observe(network, TASK, RAMP)
    wrong = attack.model_copy(update={"layer": "0"})
    assert "layer='0' is no dense layer with a bias: expected one of 3, 5" in reason(one, wrong)
    assert "the gradient of 3 is withheld" in reason(replace(one, withheld=("3.bias",)), attack)
    training = LocalTraining(lr=1.0, batch_size=2)
    (pair,) = observe(network, TASK, RAMP.repeat(2, 1, 1, 1), images=2, training=training)
    assert "holds 2 images" in reason(pair, attack)
    epochs = LocalTraining(algorithm="fedavg", lr=0.1, epochs=3)
    (several,) = observe(network, TASK, RAMP, training=epochs)
    assert "took 3 local steps" in reason(several, attack)
    assert len(pixels(attack.model_copy(update={"local_steps": "ignore"}), [several])) == 1

    def convolutional() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())

    with torch.random.fork_rng(devices=[]):
        (none,) = observe(convolutional, TASK, RAMP)
    assert "no dense layer with a bias" in reason(none, attack)


@pytest.mark.parametrize(
    "attack",
    [
        RepresentationMatching(iterations=5, width=4),
        RepresentationMatching(iterations=5, width=2, restarts=2, layer="3"),
    ],
    ids=str,
)
def test_conformance(attack: RepresentationMatching) -> None:
    check_adversary(attack)

"""The likelihood is that of `torch.distributions`, and weighs against the prior as it says."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, Normal

from adversaries.likelihood import Likelihood
from adversaries.local_steps import skeleton
from adversaries.matching import Chunk, make_batch
from adversaries.objectives import total_variation
from fl_privacy.testing import toy_observations
from fl_privacy.testing.toys import TASK
from fl_privacy.types import LocalTraining

KINDS = [
    (Likelihood(noise="gaussian", noise_scale=0.3), Normal),
    (Likelihood(noise="laplace", noise_scale=0.3), Laplace),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("attack", "noise"), KINDS)
def test_distances_differ_as_log_likelihoods_do(
    attack: Likelihood, noise: type[Normal] | type[Laplace]
) -> None:
    seen = {"w": draw(3, 4), "b": draw(3)}

    def both(guess: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        laws = {n: noise(guess[n], 0.3) for n in seen}
        likelihoods = [laws[n].log_prob(seen[n]).sum() for n in seen]  # type: ignore[no-untyped-call]
        return attack.distance(guess, seen), torch.stack(likelihoods).sum()

    some, other = {"w": draw(3, 4) + 1, "b": -draw(3)}, {"w": 0 * draw(3, 4), "b": draw(3)}
    (distance, likelihood), (distance_2, likelihood_2) = both(some), both(other)
    assert torch.allclose(distance - distance_2, likelihood_2 - likelihood, rtol=1e-5)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_multiply_and_the_prior_counts_once_for_each_input_value(rounds: int) -> None:
    """The objective times the number of input values is minus the log of the posterior."""
    (observation,) = toy_observations(1)[0]
    training = LocalTraining(lr=0.1, order="sequential")
    linked = replace(observation, local_training=training, exchanges=observation.exchanges * rounds)
    attack = Likelihood(noise_scale=0.3, tv=2.0)
    model = skeleton(linked.model(), training)
    chunk = Chunk(model, linked, (attack.prepare(linked, model),), 0)
    batch = make_batch(chunk, lanes=1, restarts=1, device=torch.device("cpu"), dtype=torch.float64)
    inputs = TASK.normalize(draw(1, *TASK.input_shape).double())
    seen = tuple({n: t[0] for n, t in one.items()} for one in batch.observed)
    labels = batch.labels[0]
    found = partial(attack.objective, batch)(inputs, labels, (seen, {}))
    simulated = attack.simulate(batch, inputs, labels)[0]
    minus_log = rounds * attack.distance(simulated, seen[0])
    prior = 2.0 * inputs.numel() * total_variation(inputs, 2)
    assert torch.allclose(found * inputs.numel(), minus_log + prior, rtol=1e-9)

"""What an attack cannot treat is refused in words, one failure a target, no exception."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adversaries.matching import attack_chunks
from adversaries.tokens import refuse_tokens
from fl_privacy.component import create
from fl_privacy.protocols import Adversary
from fl_privacy.testing import toy_observations
from fl_privacy.testing.toys import TASK
from fl_privacy.types import Exchange, Failure, LocalTraining, Observation, Reconstruction

Observe = Callable[..., list[Observation]]
CPU = torch.device("cpu")


def reason(spec: str, observation: Observation) -> str:
    """Why an attack refuses a target; nothing if it does not."""
    attack = create("adversaries", spec)
    assert isinstance(attack, Adversary)
    (result,) = attack.attack([observation], seed=0, device=CPU)
    return result.reason if isinstance(result, Failure) else ""


def toy() -> Observation:
    return toy_observations(1)[0][0]


def with_exchange(change: Callable[[Exchange], Exchange]) -> Observation:
    observation = toy()
    return replace(observation, exchanges=(change(observation.exchanges[0]),))


def silenced(layer: str) -> Observation:
    """A client whose update of one tensor is zero."""
    return with_exchange(
        lambda e: replace(e, update={n: u * (n != layer) for n, u in e.update.items()})
    )


def linked(examples: int) -> Observation:
    observation = toy()
    (one,) = observation.exchanges
    return replace(observation, exchanges=(one, replace(one, num_examples=examples)))


DROPPED = LocalTraining(algorithm="fedavg", batch_size=4, drop_last=True)


@pytest.mark.parametrize("spec", ["analytic", "rgap", "gradient_similarity(iterations=1)"])
@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (with_exchange(lambda e: replace(e, flaw="cut short")), "cut short"),
        (
            with_exchange(lambda e: replace(e, num_examples=None)),
            "expected a num-examples metric in the client's reply",
        ),
        (replace(toy(), local_training=DROPPED), "no image took part in the update"),
        (
            with_exchange(lambda e: replace(e, update={n: u * 0 for n, u in e.update.items()})),
            "the update is zero everywhere, so it tells nothing",
        ),
        (linked(2), "the linked rounds hold ['1', '2'] images: expected equally many"),
        (
            replace(toy(), withheld=("1.weight", "1.bias", "3.weight", "3.bias")),
            "every layer of the update is withheld",
        ),
        (
            replace(toy(), local_training=LocalTraining(optimizer="adam")),
            "clients train with 'adam': expected 'sgd'",
        ),
    ],
)
def test_updates_that_tell_nothing_are_refused_by_every_attack(
    spec: str, observation: Observation, message: str
) -> None:
    assert message in reason(spec, observation)


@pytest.mark.parametrize(
    ("spec", "observation", "message"),
    [
        (
            "representation(layer='3')",
            silenced("3.weight"),
            "the representation that 3 sees is zero everywhere",
        ),
        (
            "representation",
            silenced("1.bias"),
            "the bias gradient of the dense layer is zero everywhere",
        ),
        (
            "gradient_similarity(batch_norm=1.0)",
            toy(),
            "batch_norm > 0 needs a network with batch norm: set batch_norm=0",
        ),
    ],
)
def test_what_an_attack_cannot_use_is_named(
    spec: str, observation: Observation, message: str
) -> None:
    assert message in reason(spec, observation)


def normed(momentum: float | None = 0.1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=momentum), nn.Flatten(), nn.Linear(32, 4)
        )


def test_batch_norm_statistics_are_those_of_one_step_with_a_momentum(observe: Observe) -> None:
    inputs = torch.rand(4, *TASK.input_shape, generator=torch.Generator().manual_seed(0))
    spec = "gradient_similarity(iterations=1, batch_norm=1.0)"
    epochs = LocalTraining(algorithm="fedavg", lr=0.1, batch_size=2)
    (several,) = observe(normed, TASK, inputs, images=4, training=epochs)
    assert "needs one update of one local step of one client" in reason(spec, several)
    once = LocalTraining(lr=0.1, batch_size=4)
    (one,) = observe(normed, TASK, inputs, images=4, training=once)
    assert reason(spec, one) == ""
    twice = replace(
        one,
        exchanges=one.exchanges * 2,
        local_training=once.model_copy(update={"order": "sequential"}),
    )
    assert "needs one update of one local step of one client" in reason(spec, twice)
    averaging = replace(one, model=lambda: normed(momentum=None))
    assert "1 returned no running_mean with a fixed momentum" in reason(spec, averaging)


class Added(nn.Module):
    """Something other than a layer acts last."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x.flatten(1)) + 1
        return out


class Free(nn.Module):
    """Weights that are in no layer of their own kind: the first module that holds any."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4]


def test_closed_forms_say_what_the_network_lacks(observe: Observe) -> None:
    inputs = torch.rand(1, *TASK.input_shape, generator=torch.Generator().manual_seed(0))

    def added() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Added()

    (last,) = observe(added, TASK, inputs)
    assert "something other than a layer acts before the output" in reason("rgap", last)
    empty = replace(toy(), model=Free, labels=torch.tensor([0]))
    assert "the network has no layer with weights" in reason("analytic", empty)


class Tokens(nn.Module):
    """Looks its inputs up, after making integers of them or as they are."""

    def __init__(self, *, rounded: bool) -> None:
        super().__init__()
        self.rounded = rounded
        self.table = nn.Embedding(50, 2)
        self.dense = nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        indices = (x.flatten(1) * 10 + 20).long() if self.rounded else x.flatten(1)
        out: Tensor = self.dense(self.table(indices).flatten(1))
        return out


class Positions(nn.Module):
    """Looks up where a value stands, not what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(36, 1)
        self.dense = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        places: Tensor = self.table(torch.arange(36)).flatten()
        out: Tensor = self.dense(x.flatten(1) + places)
        return out


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("spec", ["gradient_similarity(iterations=1)", "dlg", "analytic", "rgap"])
def test_token_inputs_are_out_of_scope(spec: str, rounded: bool) -> None:
    said = reason(spec, replace(toy(), model=lambda: Tokens(rounded=rounded)))
    assert "table (Embedding) looks the inputs up as tokens, which are out of scope" in said
    assert "expected a network on real values" in said


def test_embeddings_of_positions_are_attacked(observe: Observe) -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Positions()

    refuse_tokens(build(), TASK)
    inputs = torch.rand(1, *TASK.input_shape, generator=torch.Generator().manual_seed(0))
    assert reason("gradient_similarity(iterations=1)", observe(build, TASK, inputs)[0]) == ""


def test_a_refused_target_spares_its_mates() -> None:
    observations, _ = toy_observations(3)
    (exchange,) = observations[1].exchanges
    observations[1] = replace(observations[1], exchanges=(replace(exchange, flaw="cut short"),))
    attack = create("adversaries", "gradient_similarity(iterations=1)")
    results = list(attack.attack(observations, seed=0, device=CPU))
    assert [isinstance(r, Reconstruction) for r in results] == [True, False, True]
    assert list(attack_chunks([], 3, lambda _: [])) == []

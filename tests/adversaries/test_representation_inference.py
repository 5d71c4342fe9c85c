"""Representations are read off dense layers: exactly for one sample, by class for several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adversaries.analytic import layer_input
from adversaries.representation_guess import RepresentationGuess
from adversaries.representation_inference import (
    RepresentationInference,
    long_rows,
    picked,
    representations,
    turned,
)
from adversaries.targets import gradient_units
from fl_privacy.component import Component
from fl_privacy.dense_layers import dense_tail, linear_inputs, seen_when_sent
from fl_privacy.metrics.representations import RepresentationCorrelation
from fl_privacy.testing import check_adversary
from fl_privacy.types import (
    Failure,
    LocalTraining,
    Observation,
    Outcome,
    Representations,
    Samples,
    Task,
)

Observe = Callable[..., list[Observation]]
CPU = torch.device("cpu")
TASK = Task(input_shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.35,))
DOUBLE = torch.float64


def pictures(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def dense(*, bias: bool = True) -> nn.Module:
    """Three dense layers behind a convolution; the last two see ReLUs' outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 32, bias=bias),
            nn.ReLU(),
            nn.Linear(32, 24, bias=bias),
            nn.ReLU(),
            nn.Linear(24, 10, bias=bias),
        )


def found(observation: Observation, **settings: object) -> Representations:
    adversary = RepresentationInference(**settings)
    (result,) = adversary.attack([observation], seed=0, device=CPU)
    assert isinstance(result, Representations), result
    return result


def reason(observation: Observation) -> str:
    (result,) = RepresentationInference().attack([observation], seed=0, device=CPU)
    assert isinstance(result, Failure)
    return result.reason


def correlations(result: Representations, truth: Samples, observation: Observation) -> list[float]:
    return [
        float(
            RepresentationCorrelation(layer=name).score_observed([result], [truth], [observation])
        )
        for name in result.layers
    ]


@pytest.mark.parametrize("pick", ["largest", "loudest", "own"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_sample_is_inferred_exactly_at_every_layer(
    observe: Observe, bias: bool, pick: str
) -> None:
    inputs = pictures(4)
    for label, observation in enumerate(observe(lambda: dense(bias=bias), TASK, inputs)):
        result = found(observation, pick=pick)
        assert result.classes.tolist() == [label]
        assert list(result.layers) == ["3", "5", "7"]
        truth = Samples(inputs[label : label + 1], torch.tensor([label]))
        assert min(correlations(result, truth, observation)) > 1 - 1e-7
        if bias:
            seen = seen_when_sent(observation, truth.inputs)
            for name, rows in result.layers.items():
                torch.testing.assert_close(rows, seen[name], rtol=1e-4, atol=1e-5)


def test_one_sample_agrees_with_dividing_the_gradient_of_weights_by_that_of_biases(
    observe: Observe,
) -> None:
    (observation,) = observe(dense, TASK, pictures(1))
    result = found(observation)
    (exchange,), training = observation.exchanges, observation.local_training
    assert training is not None
    gradient = gradient_units(exchange, training)
    for name, rows in result.layers.items():
        divided = layer_input(gradient[f"{name}.weight"], gradient[f"{name}.bias"])
        torch.testing.assert_close(rows[0], divided, rtol=1e-4, atol=1e-6)


def test_classes_of_a_batch_are_found_and_told_apart_at_the_last_layer(observe: Observe) -> None:
    """A class's own samples are in its row with ``p - 1``, those of the others with ``p``."""
    inputs, training = pictures(2), LocalTraining(lr=0.1, batch_size=2)
    (observation,) = observe(dense, TASK, inputs, images=2, training=training)
    truth = Samples(inputs, torch.arange(2))
    for classes in ("rows", "counts"):
        result = found(observation, classes=classes)
        assert result.classes.tolist() == [0, 1]
        scores = [
            RepresentationCorrelation(layer="7", truth=of)
            .score_observed([result], [truth], [observation])
            .item()
            for of in ("own", "other")
        ]
        assert scores[0] > 0.95 > scores[1]


def test_granted_labels_say_which_classes_are_present(observe: Observe) -> None:
    (observation,) = observe(dense, TASK, pictures(1))
    told = replace(observation, labels=torch.tensor([4]))
    assert found(told).classes.tolist() == [4]


def test_rows_of_later_layers_are_turned_and_the_last_is_negated() -> None:
    """By hand: two classes that share no feature, so that nothing mixes."""
    seen = {"a": torch.tensor([[1.0, 0, 2], [0, 3, 0]]), "b": torch.tensor([[5.0, 0], [0, 7]])}
    last = torch.zeros(4, 2, dtype=DOUBLE)
    last[1], last[3] = -0.5 * seen["b"][0], -0.5 * seen["b"][1]
    first = torch.stack([-0.2 * seen["a"][0], 0.4 * seen["a"][1]]).double()
    gradient = {"a.weight": first, "b.weight": last}
    inferred = representations(gradient, ("a", "b"), torch.tensor([1, 3]), "largest")
    for name, rows in inferred.items():
        assert bool((rows >= 0).all())
        for mine, true in zip(rows, seen[name], strict=True):
            assert float(nn.functional.cosine_similarity(mine, true.double(), 0)) > 1 - 1e-12


def test_sign_length_and_threshold() -> None:
    rows = torch.tensor([[1.0, -3.0], [-1.0, 3.0], [0.0, 0.0]])
    assert turned(rows).tolist() == [[-1, 3], [-1, 3], [0, 0]]
    lengths = torch.tensor([[3.0, 4.0], [0.0, 2.5], [0.0, 2.4], [0.0, 0.0]])
    assert long_rows(lengths, 0.5).tolist() == [0, 1]


def test_which_element_names_the_row() -> None:
    seen = torch.tensor([[3.0, 2.0, 1.0], [3.0, 0.0, 1.8]])
    lengths = torch.tensor([1.0, 9.0, 9.5])
    assert picked(seen, lengths, "largest").tolist() == [0, 0]
    assert picked(seen, lengths, "loudest").tolist() == [1, 2]
    shares = seen / seen.norm(dim=1, keepdim=True)
    expected = np.argmax(((shares - shares.flip(0)) * lengths).numpy(), axis=1)
    assert picked(seen, lengths, "own").tolist() == expected.tolist()
    assert picked(seen[:1], lengths, "own").tolist() == [1]


def test_several_local_steps_give_the_mean_gradient(observe: Observe) -> None:
    """With a vanishing step they are one step on all samples."""
    inputs = pictures(4)
    steps = LocalTraining(algorithm="fedavg", lr=1e-3, epochs=2, batch_size=2)
    once = LocalTraining(lr=1e-3, batch_size=4)
    (several,) = observe(dense, TASK, inputs, images=4, training=steps)
    (one,) = observe(dense, TASK, inputs, images=4, training=once)
    assert found(several).classes.tolist() == found(one).classes.tolist()
    told = [replace(o, labels=torch.arange(4)) for o in (several, one)]
    mean, exact = (found(observation).layers for observation in told)
    for name in mean:
        for mine, true in zip(mean[name], exact[name], strict=True):
            assert float(nn.functional.cosine_similarity(mine, true, 0)) > 0.999


def test_what_is_withheld_is_named_and_what_is_behind_it_still_inferred(observe: Observe) -> None:
    (observation,) = observe(dense, TASK, pictures(1))
    assert "7.weight is withheld" in reason(replace(observation, withheld=("7.weight",)))
    partial = found(replace(observation, withheld=("5.weight", "5.bias")))
    assert list(partial.layers) == ["7"]
    assert (partial.outcome.status, "5.weight is withheld" in partial.outcome.message) == (
        "partial",
        True,
    )
    assert list(found(replace(observation, withheld=("3.bias",))).layers) == ["3", "5", "7"]


def test_refusals_say_what_was_expected(observe: Observe) -> None:
    def convolutional() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())

    torch.manual_seed(0)
    assert "ends in no dense layer" in reason(observe(convolutional, TASK, pictures(1))[0])
    (observation,) = observe(dense, TASK, pictures(1))
    linked = replace(observation, exchanges=observation.exchanges * 2)
    assert "expected unit = 'update'" in reason(linked)
    (exchange,) = observation.exchanges
    silent = {n: u * (not n.startswith("7.")) for n, u in exchange.update.items()}
    blind = replace(observation, exchanges=(replace(exchange, update=silent),))
    assert "7.weight is zero everywhere" in reason(blind)


def test_the_tail_is_what_ends_the_network_one_after_the_other() -> None:
    assert dense_tail(dense(), TASK) == ("3", "5", "7")
    torch.manual_seed(0)
    split = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 36), nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 2, 3),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    assert dense_tail(split, TASK) == ("5",)
    assert dense_tail(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), TASK) == ()
    assert list(linear_inputs(dense(), {}, pictures(2))) == ["3", "5", "7"]


@pytest.mark.parametrize("of", ["all", "class"])
def test_a_guess_looks_at_no_update(observe: Observe, of: str) -> None:
    (observation,) = observe(dense, TASK, pictures(1))
    held = Samples(pictures(6), torch.tensor([1, 1, 1, 5, 5, 5]))
    granted = replace(observation, auxiliary=held)
    (exchange,) = granted.exchanges
    noise = {n: torch.randn(u.shape) for n, u in exchange.update.items()}
    blind = replace(granted, exchanges=(replace(exchange, update=noise),))
    guess = RepresentationGuess(of=of)
    answers = list(guess.attack([granted, blind], seed=0, device=CPU))
    seen = seen_when_sent(observation, held.inputs)
    for answer in answers:
        assert isinstance(answer, Representations)
        assert answer.classes.tolist() == [1, 5]
        for name, rows in answer.layers.items():
            expected = seen[name].mean(0) if of == "all" else seen[name][3:].mean(0)
            torch.testing.assert_close(rows[1], expected)


class Broken(Component):
    """Answers with representations, but for one fault."""

    requires: ClassVar[frozenset[str]] = frozenset()
    fault: str

    def attack(
        self, observations: Sequence[Observation], **context: Any
    ) -> Iterator[Representations]:
        classes = {"twice": [1, 1], "unknown": [1, 9]}.get(self.fault, [1, 2])
        value = float("nan") if self.fault == "nan" else 1.0
        rows = torch.full((3 if self.fault == "count" else 2, 5), value)
        for place, target in enumerate(observations):
            held = rows * place if self.fault == "place" else rows
            yield Representations(
                target.key, torch.tensor(classes), {"fc": held}, Outcome("completed")
            )


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("twice", "each one once"),
        ("unknown", r"of 0\.\.3"),
        ("count", r"finite rows \[2, features\]"),
        ("nan", "finite rows"),
        ("place", "position or its mates"),
    ],
)
def test_representations_that_break_the_contract_are_told_how(fault: str, told: str) -> None:
    check_adversary(Broken(fault=""))
    with pytest.raises(AssertionError, match=told):
        check_adversary(Broken(fault=fault))


def test_both_keep_the_contract() -> None:
    check_adversary(RepresentationInference())
    check_adversary(RepresentationInference(classes="rows", pick="own"))
    check_adversary(RepresentationGuess())

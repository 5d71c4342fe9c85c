"""An attack that simulates the defense has nothing left to do at the truth; a plain one has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from adversaries import replay
from adversaries.defended import defenses_of
from adversaries.gradient_matching import GradientMatching
from adversaries.local_steps import skeleton, steps
from adversaries.matching import Chunk, chunks, make_batch
from clients.defending import step_of
from clients.training import descend
from fl_privacy.component import Component, create, create_all
from fl_privacy.defenses import split_defenses
from fl_privacy.testing import toy_observations
from fl_privacy.testing.toys import TASK
from fl_privacy.threat_model import ThreatModel, ThreatModelError, check_requirements
from fl_privacy.types import (
    Exchange,
    Failure,
    LocalTraining,
    Observation,
    Samples,
    Stats,
    Tensors,
)

CPU = torch.device("cpu")
STEP = LocalTraining(lr=0.3, weight_decay=0.01, order="sequential")
EPOCHS = LocalTraining(
    algorithm="fedavg", lr=0.1, epochs=2, batch_size=2, momentum=0.5, order="sequential"
)
CLIP = "per_sample_clipping(max_norm=0.05)"


class Halved(Component):
    """A toy update defense, smooth and of weight units: halves what is above ``above``."""

    above: float = 1e-3

    def defend_update(
        self, update: Tensors, *, generator: torch.Generator
    ) -> tuple[Tensors, Stats]:
        large = {n: (u.detach().abs() > self.above) for n, u in update.items()}
        return {n: torch.where(large[n], u / 2, u) for n, u in update.items()}, {}


class Drawing(Halved):
    """A toy defense that draws noise and does not say what it does without."""

    def defend_update(
        self, update: Tensors, *, generator: torch.Generator
    ) -> tuple[Tensors, Stats]:
        noise = {n: torch.randn(u.shape, generator=generator) for n, u in update.items()}
        return {n: u + noise[n] for n, u in update.items()}, {}


class Calm(Drawing):
    """A toy defense that draws noise and says that nothing else is left without."""

    def without_noise(self) -> None:
        return None


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4)).double()


@dataclass(frozen=True)
class Case:
    defense: tuple[Any, ...]
    training: LocalTraining = STEP
    images: int = 1


SMALL = "gradient_compression(rate=0.7)"
CASES = {
    **{
        f"{label}{kind}": Case(create_all("defenses", spec), training, images)
        for label, spec in {
            "compression": SMALL,
            "compression by tensor": "gradient_compression(rate=0.7, per='tensor')",
            "top k": "top_k(k=40)",
            "update clipping": "update_clipping(max_norm=0.05)",
            "withheld": "withhold(layers=('1.bias',))",
            "each step": f"each_step(defense={SMALL!r})",
            "DP-SGD": "dp_sgd(noise_multiplier=0.0, max_norm=0.05)",
            "soteria": "soteria(layer='3', rate=0.5)",
        }.items()
        for kind, training, images in (
            ("", STEP, 1),
            (", batch", STEP, 3),
            (", local epochs", EPOCHS, 3),
        )
    },
    "clipping": Case(create_all("defenses", CLIP)),
    "clipping, batch": Case(create_all("defenses", CLIP), images=3),
    "clipping, local epochs": Case(create_all("defenses", CLIP), EPOCHS, images=3),
    "update": Case((Halved(),)),
    "update, batch": Case((Halved(),), images=3),
    "update, local epochs": Case((Halved(),), EPOCHS, images=3),
    "both": Case((*create_all("defenses", CLIP), Halved())),
}
SCALED = ("clipping", "DP-SGD", "update clipping, local epochs")
"""Where what is seen keeps its direction: weight decay is clipped too, and turns it."""
ATTACKS = ["gradient_similarity", "l2_tv", "dlg"]


def observed(case: Case) -> tuple[Observation, Tensor]:
    """What a client of the package sends, trained and defended in float64; the true inputs."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.rand(case.images, *TASK.input_shape, generator=draw, dtype=torch.float64)
    labels = torch.arange(case.images) % TASK.classes
    model, samples = network(), Samples(inputs, labels)
    sent = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradient, after = split_defenses(case.defense)

    def batch(chosen: slice) -> Any:
        own = Samples(samples.inputs[chosen], samples.labels[chosen])
        return step_of(model, TASK, own, expected_batch_size=len(own))

    taken = (batch(chosen) for chosen in steps(case.training, case.images))
    descend(model, taken, case.training, gradient, draw)
    update: Tensors = {n: p.detach() - sent[n] for n, p in model.named_parameters()}
    for defense in after:
        update, _ = defense.defend_update(update, generator=draw)
    exchange = Exchange(
        attempt=1, round=1, node="1", num_examples=case.images, digest="1", global_digest="1",
        parameters=sent, buffers={}, update=update, returned_buffers={},
    )  # fmt: skip
    observation = Observation(
        key="target", exchanges=(exchange,), model=lambda: network().float(), task=TASK,
        labels=labels, local_training=case.training, defense=case.defense,
    )  # fmt: skip
    return observation, inputs


def at(attack: GradientMatching, observation: Observation, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The objective and the length of its slope at ``inputs``, in float64."""
    training = observation.local_training
    assert training is not None
    model = skeleton(observation.model(), training)
    chunk = Chunk(model, observation, (attack.prepare(observation, model),), 0)
    told = defenses_of(observation) if attack.defended else ()
    batch = make_batch(chunk, lanes=1, restarts=1, device=CPU, dtype=torch.float64, defense=told)
    seen = (attack.scale(batch.observed), batch.statistics)
    slope = grad_and_value(partial(attack.objective, batch))
    labels = F.one_hot(batch.labels, TASK.classes).double()
    by_input, value = vmap(slope)(TASK.normalize(inputs)[None], labels, seen)
    return value.squeeze(), by_input.norm()


def attack_of(name: str, **settings: Any) -> GradientMatching:
    attack = create("adversaries", name, {"tv": 0.0, **settings})
    assert isinstance(attack, GradientMatching)
    return attack


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("label", CASES)
def test_a_simulated_defense_leaves_nothing_to_match_at_the_truth(name: str, label: str) -> None:
    observation, inputs = observed(CASES[label])
    draw = torch.Generator().manual_seed(2)
    away = inputs + 0.5 * torch.randn(inputs.shape, generator=draw, dtype=torch.float64)
    knowing = attack_of(name, defended=True)
    value, slope = at(knowing, observation, inputs)
    far, far_slope = at(knowing, observation, away)
    assert value.abs() < 1e-9 * far
    assert slope < 1e-6 * far_slope
    only_scaled = name == "gradient_similarity" and label in SCALED
    plain, _ = at(attack_of(name), observation, inputs)
    assert (plain > 1e-6 * far) != only_scaled


@pytest.mark.parametrize(
    ("defense", "settings"),
    [
        ("soteria(layer='3', rate=0.5)", {"layers": "-3.weight"}),
        ("soteria(layer='3', rate=0.5)", {"nonzero": True}),
        ("soteria(layer='1', rate=0.5)", {"layers": "-1.weight"}),
        ("gradient_compression(rate=0.7)", {"nonzero": True}),
        ("top_k(k=40)", {"nonzero": True}),
        ("withhold(layers=('1',))", {"layers": "-1"}),
    ],
)
def test_what_a_defense_leaves_alone_is_met_by_the_truth(
    defense: str, settings: dict[str, Any]
) -> None:
    step = STEP.model_copy(update={"weight_decay": 0.0})  # decay moves what was not sent, too
    observation, inputs = observed(Case(create_all("defenses", defense), step))
    for name in ATTACKS:
        plain, _ = at(attack_of(name), observation, inputs)
        value, slope = at(attack_of(name, **settings), observation, inputs)
        assert plain > 1e-6
        assert value.abs() < 1e-12
        assert slope < 1e-6


def test_clipping_hides_the_length_of_one_gradient_and_nothing_of_its_direction() -> None:
    observation, inputs = observed(CASES["clipping"])
    value, slope = at(attack_of("gradient_similarity"), observation, inputs)
    assert value.abs() < 1e-12
    assert slope < 1e-6


def test_noise_is_left_out_as_its_mean_is_zero() -> None:
    observation, inputs = observed(CASES["clipping"])
    told = replace(observation, defense=(*create_all("defenses", CLIP), Calm()))
    assert [type(d).__name__ for d in defenses_of(told)] == ["PerSampleClipping"]
    assert at(attack_of("l2_tv", defended=True), told, inputs)[0] < 1e-12


def test_a_defense_that_is_not_told_is_asked_for_by_the_setting_that_grants_it() -> None:
    observation = toy_observations(1)[0][0]
    attack = attack_of("gradient_similarity", defended=True)
    with pytest.raises(ThreatModelError, match=r'needs defense.*defense = "DEFENSE"'):
        check_requirements(attack.requires, observation, ThreatModel(), "gradient_similarity")
    assert "defense" not in attack_of("gradient_similarity").requires


@pytest.mark.parametrize(
    ("defense", "settings", "training", "said"),
    [
        ((Drawing(),), {}, None, r"Drawing does not run inside.*without_noise\(\)"),
        ((Halved(), *create_all("defenses", CLIP)), {}, None, "at most one gradient defense"),
        ((Halved(),), {"local_steps": "ignore"}, EPOCHS, "took 2 local steps before its defense"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(
    defense: Sequence[Any],
    settings: dict[str, Any],
    training: LocalTraining | None,
    said: str,
) -> None:
    observation = replace(toy_observations(1)[0][0], defense=tuple(defense))
    if training:
        observation = replace(observation, local_training=training)
    attack = attack_of("gradient_similarity", defended=True, iterations=1, **settings)
    (result,) = attack.attack([observation], seed=0, device=CPU)
    assert isinstance(result, Failure)
    assert re.search(said, result.reason), result.reason


@pytest.mark.parametrize(
    "spec", ["gradient_similarity(iterations=3)", "dlg(iterations=1, inner=4)"]
)
def test_a_replayed_step_with_a_defense_computes_the_same_bits(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        replace(o, defense=(*create_all("defenses", CLIP), Halved()))
        for o in toy_observations(3)[0]
    ]
    attack = create("adversaries", spec, {"defended": True})

    def answers() -> Tensor:
        found = attack.attack(told, seed=0, device=CPU)
        return torch.stack([result.inputs for result in found])

    monkeypatch.setattr(replay, "WORTHWHILE", 10**9)
    composed = answers()
    monkeypatch.setattr(replay, "WORTHWHILE", 1)
    assert torch.equal(answers(), composed)


def test_targets_with_other_defenses_do_not_share_a_batch() -> None:
    """The batch simulates the defense of its first target for all of them."""
    one, other = toy_observations(2)[0]
    told = replace(other, defense=create_all("defenses", "top_k(k=9)"))
    assert list(chunks([one, other], 8)) == [[0, 1]]
    assert list(chunks([one, told], 8)) == [[0], [1]]

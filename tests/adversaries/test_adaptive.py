"""The table of adaptations: complete, of equal budget, and honest about what does not apply."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from adversaries.adaptive import Adaptation, Skipped, adaptations
from adversaries.adaptive_moves import MOVES
from adversaries.local_steps import skeleton
from adversaries.situation import Situation, situation
from fl_privacy.component import BUILT_IN, Component, create, create_all
from fl_privacy.testing import toy_observations
from fl_privacy.testing.toys import toy_step
from fl_privacy.types import LocalTraining, Observation, Stats, Step, Tensors

SPECS = {
    "dp_sgd": "dp_sgd(noise_multiplier=0.5, max_norm=2.0)",
    "each_step": "each_step(defense='gaussian_noise(scale=0.01)')",
    "gaussian_noise": "gaussian_noise(scale=0.01)",
    "gradient_compression": "gradient_compression(rate=0.9)",
    "laplace_noise": "laplace_noise(scale=0.01)",
    "per_sample_clipping": "per_sample_clipping(max_norm=0.1)",
    "soteria": "soteria(rate=0.4)",
    "top_k": "top_k(k=9)",
    "update_clipping": "update_clipping(max_norm=0.1)",
    "withhold": "withhold(layers=('3.bias',))",
}
BASES = ["gradient_similarity(iterations=40, restarts=3)", "dlg(iterations=4, inner=10)"]


class Foreign(Component):
    """A defense of somebody else's."""

    def defend_update(
        self, update: Tensors, *, generator: torch.Generator
    ) -> tuple[Tensors, Stats]:
        return update, {}


def here(**changes: Any) -> Situation:
    """The toy federation, in several rounds of several local steps if need be."""
    targets = toy_observations(2)[0]
    return replace(situation(targets, []), **changes)


def against(
    defense: str | Sequence[Any], base: str = BASES[0], at: Situation | None = None
) -> dict[str, Adaptation | Skipped]:
    defenses = create_all("defenses", defense) if isinstance(defense, str) else defense
    found = adaptations(defenses, create("adversaries", base), at or here())
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def made(found: dict[str, Adaptation | Skipped]) -> dict[str, Adaptation]:
    return {name: one for name, one in found.items() if isinstance(one, Adaptation)}


def test_every_installed_defense_has_an_entry() -> None:
    assert set(BUILT_IN["defenses"]) == set(MOVES) == set(SPECS)


def evaluations(adversary: Any) -> int:
    inner = getattr(adversary, "inner", 1)
    return int(adversary.iterations * inner * adversary.restarts)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SPECS)
def test_every_adaptation_is_an_adversary_of_the_same_budget_with_a_reason(
    name: str, base: str
) -> None:
    found = against(SPECS[name], base, here(rounds=tuple(range(1, 21))))
    assert made(found)
    for one in found.values():
        assert one.reason
        if isinstance(one, Adaptation):
            assert one.reason.rstrip().endswith(".")
            adversary = create("adversaries", one.adversary)
            assert evaluations(adversary) == evaluations(create("adversaries", base))


@pytest.mark.parametrize(
    ("defense", "name", "adversary"),
    [
        ("soteria(rate=0.4)", "without 1.weight", "gradient_similarity(layers='-1.weight')"),
        ("soteria(layer='3')", "without 3.weight", "gradient_similarity(layers='-3.weight')"),
        ("soteria(rate=0.4)", "surviving entries", "gradient_similarity(nonzero=True)"),
        ("top_k(k=9)", "surviving entries", "gradient_similarity(nonzero=True)"),
        ("gradient_compression", "defense inside", "gradient_similarity(defended=True)"),
        ("withhold(layers=('1',))", "without withheld layers", "gradient_similarity(layers='-1')"),
        ("gaussian_noise(scale=0.02)", "likelihood", "likelihood(noise_scale=0.2)"),
        ("laplace_noise(scale=0.02)", "likelihood", "likelihood(noise='laplace', noise_scale=0.2)"),
        ("gaussian_noise(scale=1.0)", "stronger image prior", "gradient_similarity(tv=0.02)"),
        (
            "each_step(defense='gaussian_noise(scale=0.02)')",
            "likelihood",
            "likelihood(noise_scale=0.02)",
        ),
        (
            "dp_sgd(noise_multiplier=0.5, max_norm=4.0)",
            "likelihood",
            "likelihood(defended=True, noise_scale=2.0)",
        ),
        (
            "per_sample_clipping(max_norm=1.0)+gaussian_noise(scale=0.1)",
            "likelihood",
            "likelihood(defended=True, noise_scale=1.0)",
        ),
        (
            "soteria+gaussian_noise(scale=0.1)",
            "without 1.weight and stronger image prior",
            "gradient_similarity(layers='-1.weight', tv=0.02)",
        ),
    ],
)
def test_a_defense_is_met_by_what_undoes_it(defense: str, name: str, adversary: str) -> None:
    found = made(against(defense, "gradient_similarity"))[name].adversary
    assert create("adversaries", found) == create("adversaries", adversary)


def test_clipping_is_met_by_the_direction_unless_that_is_matched_already() -> None:
    clipping = "update_clipping(max_norm=1.0)"
    assert made(against(clipping, "l2_tv"))["direction alone"].adversary == "gradient_similarity"
    skipped = against(clipping, "gradient_similarity")["direction alone"]
    assert isinstance(skipped, Skipped)
    assert "as it is" in skipped.reason


def test_noise_of_several_local_steps_adds_up() -> None:
    training = LocalTraining(algorithm="fedavg", lr=0.1, epochs=4, batch_size=1)
    at = here(training=training)
    for defense, scale in (
        ("each_step(defense='gaussian_noise(scale=0.02)')", 0.04),
        ("gaussian_noise(scale=0.02)", 0.2),
    ):
        one = create("adversaries", made(against(defense, at=at))["likelihood"].adversary)
        assert math.isclose(one.noise_scale, scale, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("defense", "name", "why"),
    [
        ("gaussian_noise(scale=0.1)", "defense inside", "nothing but noise"),
        ("soteria", "defense inside", "matching survivors is the same"),
        ("top_k(k=9)+gaussian_noise(scale=0.1)", "surviving entries", "noise was added"),
        ("dp_sgd(epsilon=3.0)", "likelihood", "by epsilon"),
        ("top_k(k=9)", "rounds of one client", "not recorded in more"),
        ("top_k(k=9)", "early rounds", "only one round"),
    ],
)
def test_what_does_not_apply_is_told_with_its_reason(defense: str, name: str, why: str) -> None:
    skipped = against(defense, at=here(unlinkable="not recorded in more"))[name]
    assert isinstance(skipped, Skipped)
    assert why in skipped.reason


def test_a_sparse_entry_is_visible_when_the_noise_came_before_it() -> None:
    found = made(against("gaussian_noise(scale=0.1)+top_k(k=9)"))
    assert "surviving entries" in found


def test_soteria_is_simulated_where_the_mask_cannot_be_seen_and_scoring_is_affordable() -> None:
    found = made(against("soteria", at=here(images=2)))
    assert create("adversaries", found["defense inside"].adversary).defended
    small = made(against("soteria+gaussian_noise(scale=0.1)"))
    assert "defense inside" in small
    large = here(images=2)
    large.__dict__["dense"] = {"1": 2304}
    skipped = against("soteria", at=large)["defense inside"]
    assert isinstance(skipped, Skipped)
    assert "2304 features" in skipped.reason


def test_dlg_reads_the_label_off_the_bias_that_soteria_leaves() -> None:
    found = made(against("soteria(rate=0.4)", "dlg(iterations=4, inner=10)"))
    one = create("adversaries", found["without 1.weight, label read"].adversary)
    assert one == create("adversaries", "idlg(iterations=4, inner=10, layers='-1.weight')")
    assert "without 1.weight, label read" not in against("soteria(rate=0.4)")


def test_labels_of_several_images_are_not_read_off_what_soteria_pruned() -> None:
    several = here(images=3, unlinkable="")
    for name, one in made(against("soteria(layer='3')", at=several)).items():
        told = "" if name == "rounds of one client" else "3.weight"
        assert create("adversaries", one.adversary).unread == told
    for one in made(against("soteria(layer='3')")).values():  # that of one image is exact
        assert not create("adversaries", one.adversary).unread


def test_labels_are_right_where_the_pruned_rows_mislead() -> None:
    """The rows without their pruned columns miscount some batches; the untouched bias none."""
    defense = "soteria(layer='3', rate=0.6)"
    told = next(iter(made(against(defense, at=here(images=8))).values())).adversary
    wrong = {told: 0, "gradient_similarity": 0}
    for seed in range(20):
        labels = torch.randint(4, (8,), generator=torch.Generator().manual_seed(seed))
        seen = update_of(replace(toy_step(8), labels=labels), defense)
        assert seen.local_training is not None
        model = skeleton(seen.model(), seen.local_training)
        for spec in wrong:
            target = create("adversaries", spec).prepare(seen, model)
            wrong[spec] += not torch.equal(target.labels, labels.sort().values)
    assert wrong[told] == 0
    assert wrong["gradient_similarity"] > 0


def update_of(step: Step, spec: str) -> Observation:
    """What the server sees of one step that a gradient defense has changed."""
    (observation,) = toy_observations(1)[0]
    (exchange,) = observation.exchanges
    (defense,) = create_all("defenses", spec)
    gradient, _ = defense.defend_gradient(step, generator=torch.Generator())
    update = {n: -0.1 * g.detach() for n, g in gradient.items()}
    changed = replace(exchange, num_examples=len(step.labels), update=update)
    training = LocalTraining(lr=0.1, batch_size=len(step.labels))
    return replace(observation, exchanges=(changed,), local_training=training)


def test_noise_averages_out_in_an_aggregate_and_steps_are_those_of_a_client() -> None:
    (observation,) = toy_observations(1)[0]
    (exchange,) = observation.exchanges
    training = LocalTraining(algorithm="fedavg", lr=0.1, epochs=1, batch_size=1)
    together = replace(exchange, num_examples=7, members=(3, 4))
    one = replace(observation, exchanges=(together,), local_training=training)
    at = situation([one], [])
    for defense, scale in (
        ("gaussian_noise(scale=0.02)", 0.2),
        ("each_step(defense='gaussian_noise(scale=0.02)')", 0.02 * math.sqrt(4)),
    ):
        found = create("adversaries", made(against(defense, at=at))["likelihood"].adversary)
        assert math.isclose(found.noise_scale, scale * 5 / 7, rel_tol=1e-5)


def test_a_foreign_defense_is_put_inside_the_objective() -> None:
    found = made(against((Foreign(),)))
    assert found["defense inside"].adversary.endswith("defended=True)")


def test_rounds_of_one_client_and_early_rounds_join_the_first_adaptation() -> None:
    at = here(rounds=tuple(range(3, 33)), unlinkable="")
    found = made(against("top_k(k=9)", "gradient_similarity", at))
    assert found["rounds of one client"].threat_model == {"unit": "client"}
    assert not found["rounds of one client"].told
    both = found["surviving entries and rounds of one client"]
    assert both.told
    assert both.threat_model == {"unit": "client"}
    assert found["early rounds"].rounds == "3-5"
    assert not found["early rounds"].told
    assert found["surviving entries and early rounds"].adversary.endswith("(nonzero=True)")


def test_layers_that_the_base_leaves_out_stay_out() -> None:
    base = "gradient_similarity(layers='dense')"
    found = made(against("soteria(layer='3')", base))
    assert "layers='dense,-3.weight'" in found["without 3.weight"].adversary


def test_an_adversary_without_the_setting_is_left_alone() -> None:
    found = against("soteria", "analytic")
    assert not made(found)
    assert "analytic has no setting 'nonzero'" in found["surviving entries"].reason


def test_linking_is_refused_for_the_reason_that_the_attack_would_give() -> None:
    (observation,) = toy_observations(1)[0]
    (exchange,) = observation.exchanges

    def linked(training: LocalTraining, rounds: int) -> str:
        one = replace(observation, local_training=training)
        together: list[Observation] = [replace(one, exchanges=(exchange,) * rounds)]
        return situation([one], together).unlinkable

    sequential = LocalTraining(lr=0.1, order="sequential")
    assert "another random batch" in linked(LocalTraining(lr=0.1), 2)
    assert linked(sequential, 8) == ""
    assert "with --rounds" in linked(sequential, 9)
    assert "more than one round" in linked(sequential, 1)

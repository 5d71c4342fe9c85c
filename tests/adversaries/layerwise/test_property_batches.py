"""Batches of one kind each, people kept apart, and gradients as the clients compute them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adversaries.dealt_property import alike, dealt_anew
from adversaries.layerwise import property_batches
from adversaries.layerwise.batch_gradients import gradients_of
from adversaries.layerwise.property_batches import (
    Batches,
    Draws,
    distinct,
    folds_of,
    models_of,
    values_of,
)
from fl_privacy.layers import LayerMetricError
from fl_privacy.seeding import generator
from fl_privacy.testing.toys import TRAINING, toy_model, toy_observations, toy_samples
from fl_privacy.types import Observation, Samples

CPU = torch.device("cpu")
VALUES = torch.tensor([1, 0, 0, 1, -1, 0] * 20)
PEOPLE = torch.arange(120) // 4
SAMPLES = replace(toy_samples(120), properties={"smiling": VALUES, "young": 1 - VALUES.abs()})


@pytest.mark.parametrize("people", [None, PEOPLE])
def test_folds_share_no_person_and_have_about_the_same_shares(people: Tensor | None) -> None:
    fold_of = folds_of(VALUES, people, 4, seed=0)
    assert (fold_of[VALUES < 0] == -1).all()
    assert set(fold_of[VALUES >= 0].tolist()) == {0, 1, 2, 3}
    for fold in range(4):
        share = (VALUES[fold_of == fold] == 1).double().mean()
        assert abs(share - 0.4) < 0.1
    if people is not None:
        homes = [set(fold_of[(who == PEOPLE) & (VALUES >= 0)].tolist()) for who in range(30)]
        assert all(len(home) == 1 for home in homes)


def test_each_batch_is_of_one_kind_and_one_fold_and_uses_all_before_any_twice() -> None:
    fold_of = folds_of(VALUES, PEOPLE, 4, seed=0)
    drawn = Draws(VALUES, PEOPLE, folds=4, batches=3, size=3).told(0)
    assert len(drawn) == 4 * 2 * 3
    assert drawn.indices.shape == (24, 3)
    for indices, has, fold in zip(drawn.indices, drawn.has, drawn.folds, strict=True):
        assert (VALUES[indices] == has).all()
        assert (fold_of[indices] == fold).all()
        assert len(set(indices.tolist())) == 3
    for fold in range(4):
        mine = drawn.indices[(drawn.folds == fold) & (drawn.has == 1)].flatten().tolist()
        there = int(((fold_of == fold) & (VALUES == 1)).sum())
        if there >= 9:
            assert len(set(mine)) == 9


def test_batches_that_are_compared_share_no_sample() -> None:
    drawn = Draws(VALUES, None, folds=2, batches=3, size=5, apart=True).told(0)
    assert [set(VALUES[b].tolist()) for b in drawn.indices] == ([{1}] * 3 + [{0}] * 3) * 2
    assert len(set(drawn.indices.flatten().tolist())) == 60


def test_samples_and_people_are_counted_once() -> None:
    held = Draws(VALUES, PEOPLE, folds=3, batches=50, size=4).told(0)
    having, without = (VALUES == 1), (VALUES == 0)
    assert distinct(held, PEOPLE) == {
        "samples with it": int(having.sum()),
        "people with it": len(set(PEOPLE[having].tolist())),
        "samples without it": int(without.sum()),
        "people without it": len(set(PEOPLE[without].tolist())),
    }
    assert set(distinct(held, None)) == {"samples with it", "samples without it"}


def test_where_people_are_unknown_samples_are_shuffled() -> None:
    dealt = dealt_anew(VALUES, None, seed=1)
    assert (dealt != VALUES).any()
    assert torch.equal(dealt < 0, VALUES < 0)
    assert dealt.sum() == VALUES.sum()


@pytest.mark.parametrize("sizes", [[6] * 40, list(range(2, 42))])
def test_a_property_of_people_stays_one_of_people(sizes: list[int]) -> None:
    people = torch.arange(40).repeat_interleave(torch.tensor(sizes))
    own = torch.arange(40) % 2
    dealt = dealt_anew(own[people], people, seed=0)
    shares = torch.stack([dealt[people == person].double().mean() for person in range(40)])
    assert set(shares.tolist()) == {0, 1}
    assert shares.sum() == 20
    assert 10 <= int((shares == own).sum()) <= 30  # 20 are expected, 3 their deviation


def test_people_of_as_many_samples_swap_how_many_have_it() -> None:
    people = torch.arange(180) // 3
    own = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, -1]] * 20).flatten()
    dealt = dealt_anew(own, people, seed=0)

    def having(values: Tensor, size: int) -> list[int]:
        groups = values.view(-1, 3)
        return sorted(int((g == 1).sum()) for g in groups if int((g >= 0).sum()) == size)

    assert torch.equal(dealt < 0, own < 0)
    assert having(dealt, 3) == having(own, 3)
    assert having(dealt, 2) == having(own, 2)
    assert not torch.equal(dealt.view(-1, 3).sum(1), own.view(-1, 3).sum(1))


def test_people_are_alike_whose_numbers_of_samples_are_near() -> None:
    counts = torch.tensor([1] * 30 + [2] * 5 + [3] * 15 + [400] * 3)
    groups = [counts[group] for group in alike(counts)]
    assert [set(group.tolist()) for group in groups] == [{1}, {2, 3, 400}]
    assert [len(group) for group in alike(torch.tensor([5, 1, 3]))] == [3]


def test_a_number_of_a_property_that_means_nothing_is_among_its_nulls() -> None:
    """The batch mean of what goes with a person says which people were drawn, and no more."""
    people = torch.arange(240) // 20
    above = 0
    for seed in range(30):
        draw = generator(seed, "people")
        values = (torch.randperm(12, generator=draw) % 2)[people]
        look = torch.randn(12, generator=draw)[people]
        draws = Draws(values, people, folds=2, batches=4, size=10)

        def gap(held: Batches, look: Tensor = look) -> float:
            means = look[held.indices].mean(1)
            return float((means[held.has == 1].mean() - means[held.has == 0].mean()).abs())

        above += gap(draws.told(seed)) > max(gap(draws.untold(9 * seed + i)) for i in range(3))
    assert above <= 14  # 7.5 are expected, 2.4 their deviation; 21 if dealt among samples


@pytest.mark.parametrize(("models", "apart"), [(1, False), (3, False), (4, True), (9, True)])
def test_folds_have_rounds_of_their_own_where_there_are_enough(models: int, apart: bool) -> None:
    drawn = Draws(VALUES, None, folds=4, batches=6, size=2).told(0)
    at = models_of(drawn, models)
    used = [set(at[drawn.folds == fold].tolist()) for fold in range(4)]
    assert set.union(*used) == set(range(models))
    assert (sum(map(len, used)) == models) == apart  # none is used twice
    for fold in range(4):
        kinds = [at[(drawn.folds == fold) & (drawn.has == value)].tolist() for value in (0, 1)]
        assert kinds[0] == kinds[1]


def test_a_gradient_is_the_clients_own_at_the_recorded_model() -> None:
    observations, truths = toy_observations(3)
    samples = toy_samples(3)
    made = gradients_of(
        moved(observations),
        ("1", "3"),
        samples,
        [torch.tensor([i]) for i in range(3)],
        [0, 0, 0],
        device=CPU,
        seed=0,
    )
    found = dict(made)
    for i, (observation, truth) in enumerate(zip(observations, truths, strict=True)):
        assert torch.equal(truth.inputs[0], samples.inputs[i])
        update = observation.exchanges[0].update
        for layer in ("1", "3"):
            seen = -update[f"{layer}.weight"] / TRAINING.lr
            torch.testing.assert_close(found[i][layer], seen, rtol=1e-3, atol=1e-5)


def moved(observations: list[Observation]) -> list[Observation]:
    """The same, of a factory whose own weights are others than those recorded."""

    def other() -> nn.Module:
        model = toy_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        return model

    return [replace(o, model=other) for o in observations]


def test_dropout_drops_by_the_seed_alone() -> None:
    def dropping() -> nn.Module:
        model = toy_model()
        assert isinstance(model, nn.Sequential)
        return nn.Sequential(*model[:3], nn.Dropout(0.5), model[3])

    (first, *_) = toy_observations(1)[0]
    state = {n: p.detach() for n, p in dropping().named_parameters()}
    sent = replace(first.exchanges[0], parameters=state, buffers={})
    observation = replace(first, exchanges=(sent,), model=dropping)

    def gradients(seed: int) -> list[Tensor]:
        batches = [torch.arange(4)] * 2
        found = gradients_of(
            [observation], ("4",), toy_samples(4), batches, [0, 0], device=CPU, seed=seed
        )
        return [gradient["4"] for _, gradient in found]

    before = torch.random.get_rng_state()
    one, other = gradients(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one, other)
    assert torch.equal(one, gradients(0)[0])
    assert not torch.equal(one, gradients(1)[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smilng", "no property 'smilng' .*did you mean 'smiling'.* one of smiling, young"),
        ("", "several properties in the samples: .* one of smiling, young"),
        ("old", "'old' .*got 0 with, 120 without and 0 unknown"),
    ],
)
def test_a_property_that_is_none_is_refused(name: str, reason: str) -> None:
    samples = SAMPLES
    if name == "old":
        samples = replace(SAMPLES, properties={"old": torch.zeros(120, dtype=torch.int64)})
    with pytest.raises(LayerMetricError, match=reason):
        values_of(samples, name)


def test_the_only_property_needs_no_name() -> None:
    only = Samples(SAMPLES.inputs, SAMPLES.labels, {"smiling": VALUES})
    assert torch.equal(values_of(only, ""), VALUES)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(LayerMetricError, match=r"fold 1 of 4 holds 10 samples with .* got 40"):
        Draws(VALUES, None, folds=4, batches=2, size=11).told(0)
    with pytest.raises(LayerMetricError, match=r"3 batches that share none need 21: .* 42 .*or n"):
        Draws(VALUES, None, folds=2, batches=3, size=7, apart=True).told(0)
    with pytest.raises(LayerMetricError, match=r"expected 5 or more .* got 3"):
        folds_of(torch.tensor([1, 1, 1] + [0] * 9), None, 5, seed=0)


def test_too_few_people_are_refused() -> None:
    few = torch.arange(120) // 40
    with pytest.raises(LayerMetricError, match=r"expected 5 or more people .* got 3: .*folds"):
        Draws(VALUES, few, folds=5, batches=2, size=2).told(0)
    one = (torch.arange(120) < 60).long()
    with pytest.raises(LayerMetricError, match=r"60 in all, but of people who cannot be shared"):
        Draws(one, few, folds=3, batches=2, size=10).told(0)


def test_what_no_deal_leaves_enough_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(property_batches, "TRIES", 3)
    people = torch.tensor([0] * 30 + [1] * 30 + list(range(2, 42)))
    values = torch.tensor([1] * 60 + [0] * 40)
    draws = Draws(values, people, folds=2, batches=1, size=30)
    with pytest.raises(LayerMetricError, match=r"holds 20 samples without"):
        draws.told(0)
    with pytest.raises(LayerMetricError, match=r"none of 3 ways .* samples of more people"):
        draws.untold(0)

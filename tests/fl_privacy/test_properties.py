"""Attributes: phi against its definition, what is no secret, and three groups of people."""

import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.properties import (
    AttributeTable,
    Group,
    PropertyError,
    check_property,
    main_labels,
    phi,
    property_of,
    secret_property,
    split_people,
    tell_relation,
    telling_property,
)
from fl_privacy.property_facts import facts_of
from fl_privacy.types import Samples

SHARES = (0.6, 0.2, 0.2)


def drawn(n: int, share: float, seed: int) -> Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share).long()


def table(**attributes: list[int]) -> AttributeTable:
    values = {name.replace("_", " "): torch.tensor(v) for name, v in attributes.items()}
    n = len(next(iter(values.values())))
    return AttributeTable(torch.zeros(n, 1), torch.arange(n), values)


HELD = {"smiling": torch.tensor([1, 0, -1]), "bald": torch.tensor([0, 0, -1])}


def test_a_property_is_found_by_name_and_the_only_one_without() -> None:
    for find in (property_of, telling_property):
        assert find(HELD, "smiling").values is HELD["smiling"]
        assert find({"smiling": HELD["smiling"]}, "").name == "smiling"
    assert property_of(HELD, "bald").values is HELD["bald"]


@pytest.mark.parametrize(
    ("held", "name", "said"),
    [
        ({}, "", "no property in my file: load some"),
        ({}, "smiling", "no property in my file: load some"),
        (HELD, "", "several properties in my file: .* one of bald, smiling"),
        (HELD, "smile", "'smile' in my file, did you mean 'smiling'.* one of bald, smiling"),
        (HELD, "bald", "'bald' and .* in my file, got 0 with, 2 without and 1 unknown"),
    ],
)
def test_a_property_that_tells_nothing_or_is_not_there_is_refused(
    held: dict[str, Tensor], name: str, said: str
) -> None:
    with pytest.raises(PropertyError, match=said):
        telling_property(held, name, "my file")


@pytest.mark.parametrize("agreeing", [0.2, 0.5, 0.9])
def test_phi_is_the_correlation_of_two_binary_variables(agreeing: float) -> None:
    labels = drawn(300, 0.3, 0)
    values = torch.where(drawn(300, agreeing, 1) == 1, labels, 1 - labels)
    expected = np.corrcoef(labels, values)[0, 1]
    assert phi(labels, values).value == pytest.approx(expected, abs=1e-12)
    assert phi(labels, 1 - values).value == pytest.approx(-expected, abs=1e-12)


def test_unknown_values_do_not_count() -> None:
    labels, values = drawn(60, 0.5, 0), drawn(60, 0.4, 1)
    known = phi(labels[:40], values[:40])
    labels[40:50] = -1
    values[50:] = -1
    assert phi(labels, values) == known
    assert known.n == 40


def test_for_more_classes_it_is_cramers_v() -> None:
    labels, values = torch.arange(90) % 3, drawn(90, 0.4, 2)
    counts = np.array(
        [[int(((labels == c) & (values == v)).sum()) for v in (0, 1)] for c in (0, 1, 2)]
    )
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / 90
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert phi(labels, values).value == pytest.approx(np.sqrt(chi2 / 90))


def test_it_is_nan_where_one_side_has_a_single_value() -> None:
    ones, mixed = torch.ones(6, dtype=torch.int64), torch.arange(6) % 2
    for pair in ((ones, mixed), (mixed, ones)):
        value, n = phi(*pair)
        assert np.isnan(value)
        assert n == 6
    assert phi(-ones, mixed).n == 0


def test_a_property_that_the_labels_give_away_is_refused() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1, -1])
    for given_away in (labels.clone(), torch.tensor([1, 0, 0, 1, 0, 1])):
        given_away[0] = -1
        with pytest.raises(DatasetError, match=r"'Male' is the main task, or its compl.*1, n = 4"):
            check_property("Male", labels, given_away)
    with pytest.raises(DatasetError, match="the labels give it away"):
        check_property("Gray", torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1]))


def test_one_exception_makes_it_a_property_again() -> None:
    labels = torch.arange(100) % 2
    values = labels.clone()
    values[0] = 1
    assert 0.97 < check_property("Male", labels, values).value < 1


def test_samples_that_show_every_label_once_say_nothing_about_it() -> None:
    once = Samples(torch.zeros(2, 1), torch.arange(2), {"Male": torch.arange(2)})
    assert secret_property(once, "Male").relation.n == 2
    twice = Samples.joined([once, once])
    with pytest.raises(PropertyError, match=r"is the main task.*; seen in my file"):
        secret_property(twice, "Male", "my file")


@pytest.mark.parametrize(("agreeing", "level"), [(5, logging.INFO), (8, logging.WARNING)])
def test_a_property_close_to_the_task_is_a_warning(
    agreeing: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    labels = torch.arange(20) % 2
    values = torch.where(torch.arange(20) // 2 < agreeing, labels, 1 - labels)
    relation = check_property("Bald", labels, values)
    with caplog.at_level(logging.INFO, "flwr"):
        tell_relation("Bald", relation, " over my file")
    (told,) = caplog.records
    assert told.levelno == level
    samples = Samples(torch.zeros(20, 1), labels, {"Bald": values})
    facts = facts_of(samples, "")
    assert facts is not None
    assert (facts.name, facts.n) == ("Bald", 20)
    assert facts.phi == pytest.approx(agreeing / 5 - 1)
    for said in (str(facts), told.getMessage()):
        assert ("above 0.2: not unrelated" in said) == (level == logging.WARNING)
    assert facts_of(samples, "Male") is None
    one_label = facts_of(replace(samples, labels=torch.ones(20).long()), "Bald")
    assert one_label is not None
    assert one_label.phi is None


@pytest.mark.parametrize(("values", "message"), [([1, 1, -1], "is 1 for"), ([-1] * 3, "unknown")])
def test_a_property_of_one_value_is_refused(values: list[int], message: str) -> None:
    with pytest.raises(DatasetError, match=rf"property 'Bald' .*{message}"):
        check_property("Bald", torch.tensor([0, 1, 1]), torch.tensor(values))


def test_several_attributes_make_classes_of_the_samples_that_have_exactly_one() -> None:
    faces = table(Black=[1, 0, 0, 1, 0, 1], Brown=[0, 1, 0, 1, 0, -1], Gray=[0, 0, 1, 0, 0, 0])
    assert main_labels(faces, ("Black", "Brown", "Gray")).tolist() == [0, 1, 2, -1, -1, -1]
    assert main_labels(faces, ("Gray", "Black")).tolist() == [1, -1, 0, 1, -1, 1]
    assert main_labels(faces, "Brown").tolist() == [0, 1, 0, 1, 0, -1]


def test_an_unknown_attribute_is_answered_with_those_that_exist() -> None:
    faces = table(Eye_glasses=[0, 1], Bald=[1, 0])
    with pytest.raises(DatasetError, match=r"'Eyeglasses', did you mean 'Eye glasses'.*: Bald"):
        main_labels(faces, "Eyeglasses")


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_all_samples_and_nobody_twice(seed: int) -> None:
    person = torch.randint(0, 23, (200,), generator=torch.Generator().manual_seed(seed)) * 7
    groups = split_people(person, SHARES, seed)
    assert torch.equal(torch.cat(list(groups.values())).sort().values, torch.arange(200))
    who = [set(person[i].tolist()) for i in groups.values()]
    assert sum(map(len, who)) == len(set(person.tolist()))
    assert [len(people) for people in who] == [14, 4, 5]  # of 23, rounded


def test_the_samples_of_a_person_stand_together() -> None:
    person = torch.arange(100) % 20
    for indices in split_people(person, SHARES, 0).values():
        met = person[indices].tolist()
        borders = sum(a != b for a, b in pairwise(met))
        assert borders == len(set(met)) - 1


def test_groups_depend_on_the_seed_alone() -> None:
    person = torch.arange(60) // 2

    def members(seed: int) -> dict[Group, list[int]]:
        torch.manual_seed(torch.seed())
        return {group: i.tolist() for group, i in split_people(person, SHARES, seed).items()}

    assert members(1) == members(1)
    assert members(1) != members(2)


def test_too_few_people_are_refused() -> None:
    with pytest.raises(DatasetError, match="2 people cannot be shared"):
        split_people(torch.tensor([1, 1, 2]), SHARES, 0)
    assert len(split_people(torch.arange(3), (0.34, 0.33, 0.33), 0)["test"]) == 1

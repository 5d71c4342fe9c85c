"""The AUC against scikit-learn, its variance against brute force, its interval against draws."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from fl_privacy.metrics.auc import (
    AUC,
    any_has,
    auc_difference,
    auc_interval,
    clustered_variance,
    has_property,
    placements,
)
from fl_privacy.metrics.statistics import Interval
from fl_privacy.property_rows import FEDERATION, counted, joined, parsed, scored
from fl_privacy.testing import check_metric
from fl_privacy.types import Outcome, PropertyScores, Samples

NAN = math.nan


@pytest.mark.parametrize("decimals", [0, 1, 8])  # many ties, some, none
def test_the_area_is_that_of_scikit_learn(decimals: int) -> None:
    draw = np.random.default_rng(decimals)
    for _ in range(20):
        has = draw.random(30) < 0.3
        has[:2] = True, False
        scores = np.round(draw.normal(size=30) + has, decimals)
        found = auc_interval(scores.tolist(), has.tolist())
        assert found.mean == pytest.approx(roc_auc_score(has, scores), abs=1e-12)
        assert found.low <= found.mean <= found.high
        assert found.n == 30


def test_placements_are_the_rows_and_columns_of_all_comparisons() -> None:
    draw = np.random.default_rng(0)
    scores, has = np.round(draw.normal(size=25), 1), (np.arange(25) % 3 == 0).astype(float)
    positives, negatives = scores[has == 1], scores[has == 0]
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    above, below = placements(scores, has)
    assert above == pytest.approx(wins.mean(1))
    assert below == pytest.approx(wins.mean(0))


@pytest.mark.parametrize("area", [0.5, 0.9, 0.98])
def test_the_interval_covers_the_true_area_as_often_as_it_says(area: float) -> None:
    draw, shift = np.random.default_rng(1), norm.ppf(area) * 2**0.5
    has = [True] * 20 + [False] * 80
    found = [
        auc_interval([*draw.normal(shift, 1, 20), *draw.normal(0, 1, 80)], has) for _ in range(300)
    ]
    covered = np.mean([one.low <= area <= one.high for one in found])
    assert covered > 0.92  # 0.95 less three standard errors
    assert np.mean([one.high - one.low for one in found]) < 0.3


def test_a_perfect_separation_of_few_leaves_an_open_question() -> None:
    few = auc_interval([2.0, 3.0, 0.0, 1.0], [True, True, False, False])
    many = auc_interval([1.0] * 50 + [0.0] * 50, [True] * 50 + [False] * 50)
    assert few.mean == many.mean == few.high == many.high == 1
    assert few.low < 0.5 < 0.9 < many.low < 1


def test_what_is_unknown_does_not_count() -> None:
    scores, has = [0.9, 0.1, 0.5, NAN, 0.7], [True, False, None, True, False]
    assert auc_interval(scores, has).mean == 1
    assert auc_interval(scores, has).n == 3
    assert auc_interval([0.5, 0.6], [True, None]).n == 0
    assert math.isnan(auc_interval([0.5, 0.6], [True, True]).mean)
    assert math.isnan(auc_interval([0.6, 0.5, 0.4], [True, False, False]).low)  # one positive


def of_clients(
    share: float, clients: int, victims: int, seed: int
) -> tuple[list[float], list[bool | None], list[int]]:
    """20 rounds of each client, whose scores have an own level and nothing to do with victims."""
    draw, whose = np.random.default_rng(seed), np.repeat(np.arange(clients), 20)
    level = share**0.5 * draw.normal(size=clients)
    scores = level[whose] + (1 - share) ** 0.5 * draw.normal(size=len(whose))
    return scores.tolist(), (whose < victims).tolist(), whose.tolist()


def test_rounds_of_clients_that_differ_are_no_evidence_about_a_property() -> None:
    draws = [of_clients(0.5, 10, 3, seed) for seed in range(150)]
    found = [auc_interval(*one) for one in draws]
    naive = [auc_interval(*one[:2]) for one in draws]

    def excluding(intervals: list[Interval]) -> float:
        return float(np.mean([not one.low < 0.5 < one.high for one in intervals]))

    assert excluding(found) < 0.1 < 0.4 < excluding(naive)
    assert [one.mean for one in found] == [one.mean for one in naive]


def test_victims_with_rounds_of_both_kinds_are_compared_with_themselves_too() -> None:
    """Each has a level of its own, which its rounds with and without the property share."""
    found = []
    for seed in range(60):
        scores, _, whose = of_clients(0.5, 8, 0, seed)
        has = [i % 5 == 0 for i in range(len(scores))]
        found.append(
            auc_interval([s + 2 * h for s, h in zip(scores, has, strict=True)], has, whose)
        )
    truth = np.mean([one.mean for one in found])
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.9
    assert np.mean([one.high - one.low for one in found]) < 0.3


def test_one_victim_among_several_clients_has_no_interval() -> None:
    scores, has, whose = of_clients(0.5, 4, 1, 0)
    one = auc_interval(scores, has, whose)
    assert one.mean == auc_interval(scores, has).mean
    assert math.isnan(one.low)
    assert math.isnan(auc_difference(scores, scores, has, whose).low)


def test_of_a_single_client_its_rounds_are_all_there_is() -> None:
    scores, has, _ = of_clients(0.0, 4, 2, 1)
    assert auc_interval(scores, has, ["only"] * len(scores)) == auc_interval(scores, has)
    apart = list(range(len(scores)))  # each round of another client: DeLong
    bounds = auc_interval(scores, has)
    found = auc_interval(scores, has, apart)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))


def test_the_variance_of_clients_is_that_of_draws_of_whole_clients() -> None:
    """Obuchowski's against clients drawn anew, with batches of both kinds from each."""
    scores, _, whose = of_clients(0.5, 30, 0, 3)
    draw = np.random.default_rng(4)
    has = draw.random(len(scores)) < 0.3
    values, codes = np.asarray(scores), np.asarray(whose)
    above, below = placements(values, has.astype(float))
    found = clustered_variance(above, below, codes[has], codes[~has])
    areas = []
    for _ in range(400):
        chosen = np.concatenate([np.flatnonzero(codes == c) for c in draw.integers(30, size=30)])
        areas.append(placements(values[chosen], has[chosen].astype(float))[0].mean())
    assert found == pytest.approx(np.var(areas), rel=0.3)


def test_two_victims_told_apart_without_error_leave_a_wide_interval() -> None:
    has = [i < 20 for i in range(60)]
    scores, whose = [float(h) for h in has], [i // 10 for i in range(60)]
    found = auc_interval(scores, has, whose)
    assert (found.mean, found.high) == (1, 1)
    assert found.low < 0.5 < 0.9 < auc_interval(scores, has).low


def test_the_difference_is_paired() -> None:
    draw = np.random.default_rng(2)
    has = (np.arange(60) % 2 == 0).tolist()
    base = draw.normal(size=60) + np.asarray(has)
    close = (base + 0.1 * draw.normal(size=60)).tolist()
    there, back = (
        auc_difference(base.tolist(), close, has),
        auc_difference(close, base.tolist(), has),
    )
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high)
    apart = [auc_interval(s, has) for s in (base.tolist(), close)]
    assert there.mean == pytest.approx(apart[0].mean - apart[1].mean)
    assert there.high - there.low < 0.3 * (apart[0].high - apart[0].low)
    same = auc_difference(close, close, has)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "has"),
    [
        ([1, 1, 0], True),
        ([1, 0], False),  # no more than half
        ([0, 0, 1], False),
        ([1, -1, 0], None),  # the unknown one decides
        ([1, 1, -1], True),
        ([0, 0, -1], False),
        ([-1], None),
        ([], None),
    ],
)
def test_a_batch_has_what_more_than_half_of_it_has(values: list[int], has: bool | None) -> None:
    assert has_property(torch.tensor(values, dtype=torch.int64)) is has


def test_one_client_of_an_aggregate_is_enough() -> None:
    assert any_has([False, True, None]) is True
    assert any_has([False, None]) is None
    assert any_has([False, False]) is False
    assert any_has([]) is None


def test_the_metric_reads_the_scores_of_its_layer_and_the_property_they_are_of() -> None:
    def batch(has: int) -> Samples:
        odd = {"odd": torch.tensor([has]), "even": torch.tensor([1 - has])}
        return Samples(torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), odd)

    def result(score: float, name: str = "odd") -> PropertyScores:
        one = torch.tensor([score])
        return PropertyScores(
            "", one, Outcome("completed"), property=name, by_layer={"fc": 1 - one}
        )

    results, truths = [result(0.9), result(0.2), result(0.4)], [batch(1), batch(0), batch(0)]
    assert AUC().score(results, truths).tolist() == [1]
    assert AUC(layer="fc").score(results, truths).tolist() == [0]
    assert AUC(layer="other").score(results, truths).isnan().all()
    assert AUC().score([result(r.scores[0].item(), "even") for r in results], truths) == 0
    assert AUC().score([result(0.5, "unheard of")] * 3, truths).isnan().all()
    with pytest.raises(ValueError, match="shorter"):
        AUC().score(results, truths[:2])


def test_it_keeps_the_contract() -> None:
    check_metric(AUC())


def test_cells_hold_an_entry_a_round() -> None:
    assert joined([0.1 + 0.2, None, NAN, True, False]) == "0.30000000000000004,,,1,0"
    assert str(parsed("0.25,,1")) == str([0.25, NAN, 1.0])
    rows: list[dict[str, str | None]] = [
        {"key": "a", "node": "7", "auc": "0.25,0.5", "has_property": "1,"},
        {"key": "b", "auc": None, "has_property": None},
        {"key": "c", "node": "8", "auc": "1", "has_property": "0"},
    ]
    whose = [(1, "7"), (1, "7"), (1, "8")]
    assert scored(rows, "auc") == ([0.25, 0.5, 1.0], [True, None, False], whose)
    joint = [{**row, "node": node} for row, node in zip(rows, ("7+8", "7", "8"), strict=True)]
    assert scored(joint, "auc").clients == [FEDERATION] * 3


def row(node: str, has: str, number: int) -> dict[str, str]:
    return {"key": f"{node} {number}", "node": node, "auc": "0.5", "has_property": has}


def test_batches_are_counted_with_their_clients() -> None:
    one = counted(scored([row("7", has, i) for i, has in enumerate("01100")], "auc"))
    assert str(one).startswith("2 batches with the property, 3 without; rounds of 1 client, and")
    victim = [row("7", "1", i) for i in range(3)] + [row(n, "0", 0) for n in "89"]
    assert str(counted(scored(victim, "auc"))).startswith(
        "3 batches with the property of 1 client, 2 without of 2 clients: too few clients"
    )
    two = counted(scored([*victim, row("6", "1", 0), row("6", "", 1)], "auc"))
    assert str(two) == "4 batches with the property of 2 clients, 2 without of 2 clients, 1 unknown"
    every = counted(scored([row("7+8", has, i) for i, has in enumerate("010101")], "auc"))
    assert "rounds of 1 federation" in str(every)
    single = counted(scored([row("7", has, i) for i, has in enumerate("01")], "auc"))
    assert str(single) == "1 batch with the property, 1 without; rounds of 1 client"

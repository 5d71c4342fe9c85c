"""Layers over repeats: means and intervals, peaks, normalization, walks along axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from scipy import stats

from fl_privacy.layer_results import MeasureConfig, Measurement
from fl_privacy.metrics.statistics import Interval
from fl_privacy.prediction import LayerAuc, Point, points
from fl_privacy.property_table import WHOLE
from fl_privacy.report.layer_tables import prediction_table
from fl_privacy.sweep.grid import Point as GridPoint
from fl_privacy.sweep.layer_axes import MOST_LAYERS, panels, walks
from fl_privacy.sweep.layer_drawings import layers_of
from fl_privacy.sweep.layer_runs import LayerRun
from fl_privacy.sweep.layer_study import (
    Number,
    Quantity,
    Studied,
    normalized,
    numbers_of,
    peaks,
    short_titles,
    summary,
)
from fl_privacy.types import Task

TASK = Task(input_shape=(1, 2, 2), classes=2, mean=(0.0,), std=(1.0,))
AUC, NATS = Quantity("PIA", "AUC", attacked=True), Quantity("v_information", "nats")


def number(quantity: Quantity, layer: str, value: float, null: float = math.nan) -> Number:
    return Number(quantity, layer, Interval(value, value - 0.1, value + 0.1, 9), null)


def repeat(quantity: Quantity, values: dict[str, float], null: float = math.nan) -> list[Number]:
    return [number(quantity, layer, value, null) for layer, value in values.items()]


def measurement(
    values: dict[str, float],
    *,
    about: str = "",
    rounds: tuple[str, ...] = ("1:9",),
    columns: Mapping[str, tuple[float, ...]] | None = None,
    errors: tuple[float, ...] = (),
) -> Measurement:
    told = f"(batches=2, property={about!r})" if about else ""
    config = MeasureConfig(
        metric=f"v_information{told}", name="v_information", settings={"property": about},
        needs="property", source="auxiliary", data="", data_digest="", samples=4, rounds=rounds,
        updates=2, targets_digest="", model="mlp", task=TASK,
        threat_model={}, seed=0, device="cpu", threads=1, recording_digest="", code_digest="",
        versions={},
    )  # fmt: skip
    return Measurement(
        config=config, unit="nats", layers=tuple(values), values=tuple(values.values()),
        standard_errors=errors, n=4, columns=dict(columns or {}), seconds=0,
    )  # fmt: skip


def auc(layer: str, value: float, *, about: str = "", null: float | None = None) -> LayerAuc:
    chance = None if null is None else Interval(null, math.nan, math.nan, 9)
    return LayerAuc("PIA", about, layer, Interval(value, value - 0.1, value + 0.1, 9), chance)


def test_means_have_students_interval_over_repeats() -> None:
    values = [0.1, 0.4, 0.2, 0.25]
    table = summary([repeat(NATS, {"a": v, "b": math.nan}, null=v / 2) for v in values])
    found = table[NATS]["a"]
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / 4, scale=stats.sem(values)
    )
    assert found.value.mean == pytest.approx(sum(values) / 4)
    assert (found.value.low, found.value.high) == pytest.approx((low, high))
    assert (found.value.n, found.repeats) == (4, 4)
    assert found.null == pytest.approx(found.value.mean / 2)
    assert (table[NATS]["b"].value.n, table[NATS]["b"].repeats) == (0, 0)


def test_a_single_repeat_keeps_its_own_interval() -> None:
    found = summary([repeat(AUC, {"a": 0.7})])[AUC]["a"]
    assert found.value == Interval(0.7, 0.7 - 0.1, 0.7 + 0.1, 9)
    assert found.repeats == 1


@pytest.mark.parametrize("quantity", [AUC, Quantity("distance", "share of the largest distance")])
def test_intervals_of_shares_end_at_0_and_1(quantity: Quantity) -> None:
    found = summary([repeat(quantity, {"a": v}) for v in (0.3, 0.9)])[quantity]["a"]
    assert (found.value.low, found.value.high) == (0.0, 1.0)
    free = summary([repeat(NATS, {"a": v}) for v in (0.3, 0.9)])[NATS]["a"]
    assert free.value.low < 0
    assert free.value.high > 1


def test_the_peak_is_that_of_the_mean_and_counted_over_repeats() -> None:
    repeats = [
        repeat(AUC, {WHOLE: 1.0, "a": 0.6, "b": 0.9, "c": math.nan}),
        repeat(AUC, {WHOLE: 1.0, "a": 0.8, "b": 0.7, "c": math.nan}),
        repeat(AUC, {WHOLE: 1.0, "a": 0.7, "b": 0.7, "c": math.nan}),
    ]
    (peak,) = peaks(repeats)
    assert peak.layers == ("b",)
    assert (peak.times, peak.repeats) == (2, 3)  # the third has two peaks, "b" among them


def test_at_the_peak_stands_the_null_with_its_interval() -> None:
    nulls = [0.45, 0.52, 0.56]
    repeats = [repeat(AUC, {"a": 0.6, "b": 0.9}, null=null) for null in nulls]
    (peak,) = peaks(repeats)
    low, high = stats.t.interval(0.95, 2, loc=sum(nulls) / 3, scale=stats.sem(nulls))
    assert peak.null.mean == pytest.approx(0.51)
    assert peak.null.n == 3
    assert (peak.null.low, peak.null.high) == pytest.approx((low, high))
    assert peak.value == summary(repeats)[AUC]["b"].value
    (unknown,) = peaks([repeat(NATS, {"a": 0.6})])
    assert math.isnan(unknown.null.mean)


def test_layers_that_are_equal_share_the_peak_and_columns_have_none() -> None:
    column = Quantity("PIA", "", "null")
    repeats = [repeat(AUC, {"a": 1.0, "b": 1.0, "c": 0.2}) + repeat(column, {"a": 1.0})]
    assert [(p.quantity, p.layers, p.times) for p in peaks(repeats)] == [(AUC, ("a", "b"), 1)]


def test_a_repeat_becomes_numbers_with_their_nulls() -> None:
    columns = {"null": (0.01, 0.02), "ceiling": (0.69, 0.69)}
    run = LayerRun(
        0,
        (auc(WHOLE, 0.9, null=0.5), auc("a", 0.8, null=0.4)),
        (measurement({"a": 0.3, "b": 0.1}, columns=columns, errors=(0.05, 0.01)),),
    )
    table = summary([numbers_of(run)])
    attacked, measured, *told = table
    assert attacked.attacked
    assert table[attacked]["a"].null == 0.4
    assert measured == Quantity("v_information, auxiliary", "nats")
    assert table[measured]["a"].value == Interval(0.3, 0.3 - 1.96 * 0.05, 0.3 + 1.96 * 0.05, 4)
    assert [table[measured][layer].null for layer in "ab"] == [0.01, 0.02]
    assert [quantity.column for quantity in told] == ["null", "ceiling"]
    assert layers_of([table]) == [WHOLE, "a", "b"]


def test_several_properties_and_rounds_of_one_repeat_are_told_apart() -> None:
    found = (
        measurement({"a": 1.0}, about="Male"),
        measurement({"a": 2.0}, about="Young"),
        measurement({"a": 3.0}, about="Young", rounds=("1:1",)),
    )
    aucs = (auc("a", 0.5, about="Male"), auc("a", 0.6, about="Young"))
    titles = [number.quantity.title for number in numbers_of(LayerRun(0, aucs, found))]
    kind = "v_information (batches 2), auxiliary"
    assert titles == [
        *("PIA, Male", "PIA, Young", f"{kind}, Male, round 9"),
        *(f"{kind}, Young, round 9", f"{kind}, Young, round 1"),
    ]
    alone = numbers_of(LayerRun(0, aucs[:1], found[:1]))
    assert [number.quantity.title for number in alone] == ["PIA", kind]  # so that points compare


def test_short_titles_keep_what_tells_them_apart() -> None:
    titles = ["v (family a), auxiliary", "v (family b), auxiliary", "s (n 2), audit"]
    assert list(short_titles(titles).values()) == [*titles[:2], "s, audit"]


def test_normalized_points_span_0_to_1_in_each_group() -> None:
    scales = {"run 1": 1.0, "run 2": 100.0}
    given = [
        Point("v", "", layer, group, scale * value, 0.5)
        for group, scale in scales.items()
        for layer, value in {"a": 2.0, "b": 3.0, "c": 6.0}.items()
    ]
    same = [Point("s", "", layer, "run 1", 7.0, 0.5) for layer in "ab"]
    found = normalized([*given, *same, Point("v", "", "d", "run 1", math.inf, 0.5)])
    assert [p.value for p in found] == [0, 0.25, 1] * 2
    assert {p.metric for p in found} == {"v"}


def test_the_correlation_is_over_layers_and_repeats_and_leaves_the_whole_update_out() -> None:
    aucs = (auc(WHOLE, 0.1), *(auc(layer, 0.5 + i / 10) for i, layer in enumerate("abc")))
    found = measurement({"a": 1.0, "b": 2.0, "c": 3.0})
    every = [p for seed in range(3) for p in points([found], aucs, run=str(seed))]
    (line,) = prediction_table(every)
    assert line["over"] == "3 layers of 1 network, 3 runs"
    assert line["pearson"].startswith("1.00")


def studied(
    axes: dict[str, float | str], strength: str = "", values: Sequence[float] = (1, 2)
) -> Studied:
    point = GridPoint(tuple(axes.items()), "noise" if strength else "none", strength, strength)
    runs = (
        LayerRun(seed, (), (measurement({"a": v, "b": 3 * v}, columns={"null": (0.0, 0.5)}),))
        for seed, v in enumerate(values)
    )
    return Studied(point, "mlp", tuple(runs))


def test_a_walk_ascends_along_numbers_and_keeps_all_else() -> None:
    found = [
        studied({"batch-size": batch, "clients": clients, "model": "mlp"})
        for batch, clients in [(32, 2), (8, 2), (32, 4)]
    ]
    ways = {way.axis: way for way in walks(found)}
    assert set(ways) == {"batch-size", "clients"}
    assert ways["batch-size"].ticks == ("8", "32")
    assert ways["batch-size"].points == (found[1], found[0])
    assert ways["batch-size"].fixed == "clients 2, model mlp"


def test_a_walk_along_strengths_begins_without_the_defense() -> None:
    found = [studied({}), studied({}, "0.1"), studied({}, "0.01")]
    (way,) = walks(found)
    assert (way.axis, way.ticks) == ("strength of noise", ("none", "0.1", "0.01"))


def test_a_panel_has_a_line_a_layer_with_the_mean_over_repeats() -> None:
    (way,) = walks([studied({"lr": 1}), studied({"lr": 2}, values=(4, 6))])
    titles = short_titles(q.title for one in way.points for q in one.table)
    (panel,) = panels(way, titles)
    assert {line.label: [v.mean for v in line.values] for line in panel.lines} == {
        "a": [1.5, 5.0],
        "b": [4.5, 15.0],
    }
    assert list(panel.null) == [0.25, 0.25]


def test_many_layers_become_their_mean_and_the_largest() -> None:
    many = {f"l{i}": float(i) for i in range(MOST_LAYERS + 1)}
    runs = tuple(LayerRun(seed, (), (measurement(many),)) for seed in range(2))
    points_ = [Studied(GridPoint((("lr", v),), "none", "", ""), "mlp", runs) for v in (1, 2)]
    (way,) = walks(points_)
    (panel,) = panels(way, short_titles(q.title for q in points_[0].table))
    assert {line.label: line.values[0].mean for line in panel.lines} == {
        "mean over layers": pytest.approx(MOST_LAYERS / 2),
        "largest layer": MOST_LAYERS,
    }

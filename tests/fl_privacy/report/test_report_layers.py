"""The report's section on layers: tables, figure, correlation, protection; nothing unescaped."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from fl_privacy.layer_results import MeasureConfig, Measurement, write_measurement
from fl_privacy.metrics.statistics import Interval
from fl_privacy.prediction import LayerAuc, points, predictions
from fl_privacy.property_facts import PropertyFacts
from fl_privacy.protection import Comparison, Measured, Protection, Spread, write_protection
from fl_privacy.report import write_report
from fl_privacy.report.layer_aucs import layer_aucs
from fl_privacy.report.layer_tables import auc_table, prediction_table
from fl_privacy.report.layer_words import columns, number, rounds_in_words
from fl_privacy.report.layers import groups_of
from fl_privacy.report.scores import Analysis, null_of, set_score
from fl_privacy.results import MetricInfo, ResultConfig
from fl_privacy.testing.toys import TASK
from fl_privacy.threat_model import ThreatModel

LAYERS = ("conv1", "conv2", "fc1", "<script>alert(1)</script>")
VALUES = (0.1, 0.2, 0.6, 0.3)
EVIL = "<b>&\"'"


def config(**changed: Any) -> MeasureConfig:
    settings: dict[str, Any] = {
        "metric": "v_information(property='smiling')",
        "name": "v_information",
        "settings": {"property": "smiling", "batches": 20},
        "needs": "property",
        "source": "auxiliary",
        "data": "the test split of faces",
        "data_digest": "a" * 64,
        "samples": 400,
        "rounds": ("1:10",),
        "updates": 2,
        "targets_digest": "b" * 64,
        "model": "mlp",
        "task": TASK,
        "threat_model": ThreatModel().model_dump(mode="json"),
        "seed": 3,
        "device": "cpu",
        "threads": 1,
        "recording_digest": "c" * 64,
        "code_digest": "d" * 64,
        "versions": {},
    }
    return MeasureConfig(**{**settings, **changed})


def measured(values: tuple[float, ...] = VALUES, **changed: Any) -> Measurement:
    own = {name: changed.pop(name) for name in ("columns", "standard_errors") if name in changed}
    return Measurement(
        config=config(**changed),
        unit="nats",
        layers=LAYERS,
        values=values,
        n=80,
        seconds=2.0,
        **own,
    )


def aucs(values: tuple[float, ...], property: str = "smiling") -> list[LayerAuc]:
    pairs = zip(LAYERS, values, strict=True)
    return [
        LayerAuc("pia", property, layer, Interval(v, v - 0.1, v + 0.05, 60)) for layer, v in pairs
    ]


def page(run: Path) -> str:
    return write_report(run).read_text()


def section(text: str) -> str:
    found = re.search(r'<section id="layers">.*?</section>', text, re.DOTALL)
    assert found is not None
    return found[0]


def test_a_row_a_layer_with_every_column(synthetic_run: Callable[..., Any]) -> None:
    run = synthetic_run().path
    told = {
        "ceiling": (0.693,) * 4,
        EVIL: (math.nan, math.inf, -1.0, 1e-9),
        "permuted labels, mean": (0.01, 0.02, -0.01, 0.0),
    }
    one = measured(columns=told, standard_errors=(0.01,) * 4, source="audit", data=EVIL)
    write_measurement(run, one)
    shown = section(page(run))
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", shown)
    assert len(rows) == len(LAYERS)
    assert all(row.count("<td") == 5 for row in rows)
    assert "0.693" in rows[0]
    assert "∞" in rows[1]
    assert "−1" in rows[2]
    assert "AUDIT: clients’ own samples" in shown
    assert "nats" in shown
    assert "round 10" in shown
    assert "400 samples" in shown
    assert "n 80" in shown
    assert "batches 20" in shown


def test_nothing_from_outside_is_unescaped_and_nothing_is_fetched(
    synthetic_run: Callable[..., Any],
) -> None:
    run = synthetic_run().path
    bad: dict[str, Any] = {
        "settings": {"property": EVIL, "x": EVIL},
        "data": EVIL,
        "metric": f"v(property={EVIL!r})",
    }
    write_measurement(run, measured(columns={EVIL: VALUES}, **bad))
    text = page(run)
    assert "<script" not in text
    assert EVIL not in text
    assert "<b>&amp;" not in section(text)
    assert "&lt;script&gt;alert(1)" in section(text)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)


def test_a_figure_has_a_bar_for_each_layer(synthetic_run: Callable[..., Any]) -> None:
    run = synthetic_run().path
    write_measurement(run, measured())
    write_measurement(run, measured((1.0, math.nan, 2.0, 3.0), metric="other", name="other"))
    shown = section(page(run))
    assert shown.count("<svg") == 1
    assert shown.count("<h3>") == 1
    bars = re.findall(r"style=\"fill: var\(--guess\)[^\"]*\"", shown)
    assert len(bars) == 4 + 3  # a layer without a number has none
    assert 'role="img" aria-label="Measured at the global model of round 10' in shown
    write_measurement(run, measured(rounds=("1:2",)))
    shown = section(page(run))
    assert shown.count("<svg") == 2
    assert shown.index("round 2") < shown.index("round 10")


def test_what_the_attacker_got_comes_first(synthetic_run: Callable[..., Any]) -> None:
    (group,) = groups_of([measured()], aucs((0.5, 0.6, 0.9, 0.7)))
    drawn = str(group["figure"])
    assert drawn.index("attacker, smiling") < drawn.index("v information, smiling")
    assert drawn.count("fill: var(--attack)") == 4
    (alone,) = groups_of([], aucs((0.5, 0.6, 0.9, 0.7)))
    assert alone["title"] == "Attacked alone"


def attack(scores: dict[str, str], **settings: Any) -> Analysis:
    """Property inference on three batches, the first without the property; layer -> scores."""
    infos = tuple(
        MetricInfo(
            name=f"auc(layer={layer!r})" if layer else "auc",
            unit="share of pairs",
            higher_is_leakier=True,
            spec=f"auc(layer={layer!r})" if layer else "auc",
            set_level=True,
        )
        for layer in scores
    )
    known = ResultConfig(
        name="property_inference", adversary="property_inference", settings=settings,
        threat_model=ThreatModel().model_dump(mode="json"), seed=0, device="cpu", width=0,
        recording_digest="", metrics=infos,
    )  # fmt: skip
    cells = {info.name: cell for info, cell in zip(infos, scores.values(), strict=True)}
    row = {"key": "k", "defense": "", "has_property": "0,1,1", **cells}
    return Analysis("pia", (), known, [row])


def test_the_auc_of_each_layer_is_read_from_the_attack_and_its_null() -> None:
    told = attack({"": "0,1,1", "fc1": "0.2,0.9,0.1", "conv1": "0.5,0.9,0.6"}, property="smiling")
    null = attack({"": "0,1,1", "fc1": "0.9,0.8,0.7"}, property="smiling", permuted=True)
    found = {one.layer: one for one in layer_aucs([told, null])}
    assert list(found) == ["fc1", "conv1"]  # not the whole update, and not the null's own
    assert {layer: one.auc.mean for layer, one in found.items()} == {"fc1": 0.5, "conv1": 1.0}
    assert found["fc1"].property == "smiling"
    assert found["fc1"].null is not None
    assert found["fc1"].null.mean == 0
    other = attack({"fc1": "0.9,0.8,0.7"}, property="age", permuted=True)
    assert layer_aucs([told, other])[0].null is None


def test_an_attack_that_named_no_property_is_about_the_one_it_found() -> None:
    told = attack({"fc1": "0.2,0.9,0.1"}, property="")
    facts = PropertyFacts(name="age", phi=0.4, n=90)
    known = told.config.model_copy(update={"relation": facts})
    (auc,) = layer_aucs([replace(told, config=known)])
    assert (auc.property, auc.relation) == ("age", facts)
    smiling = measured((0.1,) * 4)
    assert not points([smiling], [auc])
    assert "phi of age to the main task +0.400 (n = 90), above 0.2" in auc_table([auc])["counts"]


def test_the_null_is_that_of_the_same_code_and_of_most_targets() -> None:
    told = attack({"fc1": "0.2,0.9,0.1"}, property="smiling")

    def null(code: str, keys: str) -> Analysis:
        one = attack({"fc1": "0.9,0.8,0.7"}, property="smiling", permuted=True)
        known = one.config.model_copy(update={"code_digest": code})
        return replace(one, config=known, rows=[{**one.rows[0], "key": key} for key in keys])

    old, partial, own = null("old", "k"), null("", "x"), null("", "kx")
    assert null_of(told, [old, partial, own]) is own
    assert null_of(told, [old]) is old


def test_targets_that_either_attack_failed_on_are_left_out_of_the_comparison() -> None:
    told = attack({"fc1": "0.1,0.9,0.9"}, property="smiling")
    null = attack({"fc1": "0.5,0.5,0.5"}, property="smiling", permuted=True)
    (metric,) = told.config.metrics
    cells = {"a": "0.1,0.9,0.9", "b": None, "c": "0.2,0.8,0.8", "d": "0.9,0.1,0.1"}
    rows = [{**told.rows[0], "key": key, metric.name: cell} for key, cell in cells.items()]
    failed = [
        {**null.rows[0], "key": key, metric.name: None if key == "d" else "0.5,0.5,0.5"}
        for key in reversed(cells)
    ]
    found = set_score(replace(told, rows=rows), "", metric, replace(null, rows=failed))
    assert found.guess is not None and found.gain is not None
    assert (found.guess.n, found.guess.mean) == (6, 0.5)
    assert found.gain.mean == 0.5, "of a and c alone, each beside its own null"


def test_batches_of_each_kind_stand_beside_the_auc_with_their_clients() -> None:
    told = attack({"fc1": "0.2,0.9,0.1"}, property="smiling")
    shown = auc_table(layer_aucs([told]))
    assert [line["n"] for line in shown["lines"]] == ["2 + 1"]
    assert shown["counts"] == "2 batches with the property, 1 without; rounds of 1 client"


def test_no_section_without_measurements(synthetic_run: Callable[..., Any]) -> None:
    assert 'id="layers"' not in page(synthetic_run().path)


def test_intervals_of_the_metric_stand_with_its_value() -> None:
    one = measured(columns={"low": (0.0,) * 4, "high": (1.0,) * 4, "ceiling": (0.693,) * 4})
    told = columns(one)
    assert [column.title for column in told] == ["v information", "ceiling"]
    assert told[0].cells[2] == "0.6 [0, 1]"


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "–"), (-math.inf, "−∞"), (0.12345, "0.123"), (-1234.5, "−1.23e+03")],
)
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said


def test_rounds_in_words() -> None:
    assert rounds_in_words(("1:10",)) == "round 10"
    assert rounds_in_words(("1:1", "2:3")) == "rounds 1, 3 of attempt 2"


def test_a_metric_that_orders_layers_as_the_attack_does_predicts_it() -> None:
    found = points([measured()], aucs((0.5, 0.6, 0.95, 0.7)))
    (one,) = predictions(found)
    assert (one.pearson.interval.n, one.pearson.networks, one.pearson.repeats.n) == (4, 1, 1)
    assert one.spearman.interval.mean == pytest.approx(1)
    assert one.spearman.p == pytest.approx(2 / 24)
    assert not predictions(points([measured()], aucs((0.5, 0.6, 0.9, 0.7))[:2]))


def test_metrics_meet_the_attack_on_the_same_property_only() -> None:
    on_smiling, on_age = aucs((0.5, 0.6, 0.9, 0.7)), aucs((0.9, 0.5, 0.6, 0.7), "age")
    about = points([measured()], [*on_smiling, *on_age])
    assert {p.auc for p in about} == {0.5, 0.6, 0.9, 0.7}
    assert len(about) == 4
    anything = measured(metric="label_sensitivity", name="label_sensitivity", settings={})
    assert len(points([anything], [*on_smiling, *on_age])) == 8
    (one,) = predictions(points([anything], [*on_smiling, *on_age]))
    apart = [predictions(points([anything], one))[0].pearson for one in (on_smiling, on_age)]
    assert one.pearson.interval.mean == pytest.approx(sum(r.interval.mean for r in apart) / 2)
    assert one.pearson.repeats.n == 1


def test_runs_rounds_and_attackers_tell_of_the_same_layers_again() -> None:
    attack = aucs((0.5, 0.6, 0.9, 0.7))
    again = [replace(auc, attacker="another") for auc in attack]
    rounds = [measured(rounds=(f"1:{number}",)) for number in (1, 5, 10)]
    (alone,) = predictions(points([measured()], attack))
    (often,) = predictions([p for r in "abcde" for p in points(rounds, [*attack, *again], run=r)])
    assert often.pearson.interval.mean == pytest.approx(alone.pearson.interval.mean)
    assert often.pearson.interval.low == pytest.approx(alone.pearson.interval.low)
    assert (often.pearson.interval.n, often.pearson.p) == (4, alone.pearson.p)
    assert often.pearson.repeats.n == 5


def test_columns_that_do_not_vary_predict_nothing() -> None:
    one = measured(columns={"ceiling": (0.693,) * 4, "literal": (0.6, 0.3, 0.2, 0.1)})
    told = prediction_table(points([one], aucs((0.5, 0.6, 0.95, 0.7))))
    assert [line["column"] for line in told] == ["", "literal"]
    assert told[0]["spearman"].startswith("1.00, p 0.083")


def protection(**changed: Any) -> Protection:
    got = {"low": 0.5, "high": 0.95, "n": 5}
    info = MetricInfo(name="auc", unit="share of pairs", higher_is_leakier=True)
    line = Comparison(
        adversary=EVIL,
        metric=info,
        nothing=Measured(mean=0.91, **got),
        chosen=Measured(mean=0.55, **got),
        random=Spread(mean=0.83, lowest=0.7, highest=0.9, n=2),
        better=Measured(mean=0.28, low=0.11, high=0.4, n=5),
    )
    settings: dict[str, Any] = {
        "budget": 2,
        "by": "auc",
        "unit": "AUC",
        "ranking": (("fc1", 0.9), ("conv1", 0.8), ("conv2", 0.6)),
        "source": "audit",
        "averaged": ("one", "the other"),
        "unranked": ("conv3", "fc2"),
        "layers": ("fc1", "conv1"),
        "sets": (("fc1", "conv2"), ("conv1", "conv2")),
        "comparisons": (line,),
        "seed": 0,
        "recording_digest": "c" * 64,
        "code_digest": "d" * 64,
        "created": "2026-01-01",
    }
    return Protection(**{**settings, **changed})


def test_what_withholding_does_is_shown(synthetic_run: Callable[..., Any]) -> None:
    run = synthetic_run().path
    write_protection(run, protection(), ThreatModel())
    shown = section(page(run))
    assert "Withhold fc1, conv1" in shown
    assert "withhold(layers=(&#39;fc1&#39;, &#39;conv1&#39;))" in shown
    for said in (
        "0.91 [0.50,", "0.55 [0.50,", "0.83 (0.70 to 0.90)", "+0.28 [+0.11,",
        "2 random layers, mean of 2 draws", "AUDIT: measured on the clients’ own samples",
        "The mean of one; the other.", "in no choice: conv3, fc2.",
    ):  # fmt: skip
        assert said in shown.replace("\u00a0", " ")
    assert EVIL not in shown


@pytest.mark.parametrize("kind", ["layers", "protection"])
def test_a_damaged_file_is_named(
    synthetic_run: Callable[..., Any], kind: Literal["layers", "protection"]
) -> None:
    run = synthetic_run().path
    folder = run / kind / "1-by-x" if kind == "protection" else run / kind
    folder.mkdir(parents=True)
    (folder / "protection.json").write_text("{")
    with pytest.raises(ValueError, match=r"protection\.json.*remove it and repeat fl-privacy"):
        write_report(run)

"""Gains, verdicts and figures: signs, pairing, and what a number does not show."""

from __future__ import annotations

import base64
import io
import math
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fl_privacy.metrics.statistics import Interval, mean_interval
from fl_privacy.report import words
from fl_privacy.report.figures import Curve, Spread, accuracy_figure, spread_figure
from fl_privacy.report.gallery import png
from fl_privacy.report.scores import gain, interval_of, paired
from fl_privacy.results import MetricInfo
from fl_privacy.types import LocalTraining

PSNR = MetricInfo(name="psnr", unit="dB", higher_is_leakier=True)
MSE = MetricInfo(name="mse", unit="squared pixel range", higher_is_leakier=False)
LABELS = MetricInfo(name="label_accuracy", unit="share of labels", higher_is_leakier=True)


def rows(name: str, **values: float | None) -> list[dict[str, object]]:
    return [{"key": key, name: value} for key, value in values.items()]


def test_gain_is_the_mean_of_paired_differences() -> None:
    mine = rows("psnr", a=20.0, b=22.0, c=None, d=50.0)
    guess = rows("psnr", b=10.0, a=12.0, c=9.0, e=1.0)
    got = gain(paired(mine, guess, PSNR), PSNR)
    assert (got.mean, got.n) == (10.0, 2)
    assert got == mean_interval([8.0, 12.0])


def test_rounds_of_one_client_do_not_make_an_interval_narrower() -> None:
    """Ten rounds on the same images say no more of other clients than one does."""
    once = [row(20.0, "1", 1), row(23.0, "2", 1), row(25.0, "3", 1)]
    often = [row(r["psnr"], r["node"], i) for r in once for i in range(10)]
    guess = [{**r, "psnr": 10.0} for r in often]
    got, want = (gain(paired(mine, guess, PSNR), PSNR) for mine in (often, once))
    assert (got.low, got.high) == pytest.approx((want.low, want.high))
    assert (got.n, want.n) == (30, 3)
    alone = gain(paired(often[:10], guess, PSNR), PSNR)
    assert math.isnan(alone.low)
    assert "One client alone" in words.verdict(alone, PSNR)


def row(psnr: Any, node: Any, number: int) -> dict[str, Any]:
    key = f"{node} {number}"
    return {"key": key, "attempt": 1, "round": number, "node": node, "psnr": psnr}


def test_gain_is_positive_where_more_leaked() -> None:
    assert gain([(0.01, 0.09, "a")], MSE).mean == pytest.approx(0.08)
    assert gain([(9.0, 10.0, "a")], PSNR).mean == -1.0


def test_a_share_that_is_always_one_is_not_certain() -> None:
    always = interval_of([1.0] * 32, LABELS)
    assert (always.mean, always.high, always.n) == (1.0, 1.0, 32)
    assert always.low < 0.9


def test_intervals_of_shares_and_of_their_differences_stay_in_range() -> None:
    values = [1.0, 0.75, 1.0, 1.0, 1.0]
    assert mean_interval(values).high > 1  # which is why Student's t will not do
    assert interval_of(values, LABELS).high <= 1
    always = gain([(1.0, 0.0, client) for client in range(5)], LABELS)
    assert (always.mean, always.high) == (1.0, 1.0)
    assert 0 < always.low < 1
    mixed = gain([(1.0, 0.0, "a"), (1.0, 0.25, "b"), (1.0, 0.0, "c")], LABELS)
    assert mixed.mean == pytest.approx(11 / 12)
    assert -1 <= mixed.low < mixed.mean < mixed.high <= 1


def test_a_metric_is_named_without_its_settings_which_are_told_apart() -> None:
    spec = "identifiability(gallery='fashion-mini', size=600)"
    info = MetricInfo(
        name="identifiability(size=900)",
        unit="share of images",
        higher_is_leakier=True,
        spec=spec,
    )
    assert words.metric_name(info.name) == "identifiability"
    assert words.metric_settings(info) == "gallery 'fashion-mini', size 600"
    assert words.metric_settings(LABELS) == ""


@given(low=st.floats(-50, 50), width=st.floats(0.1, 20))
def test_the_verdict_follows_the_interval_and_never_says_private(low: float, width: float) -> None:
    said = words.verdict(Interval(low + width / 2, low, low + width, 8), PSNR)
    assert ("leaked" in said) == (low > 0)
    assert ("worse" in said) == (low + width < 0)
    assert low > 0 or "no proof of privacy" in said


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (-3.14159, PSNR, "−3.1"),
        (-0.01, PSNR, "0.0"),
        (0.01234, MSE, "0.012"),
        (math.nan, PSNR, "–"),
    ],
)
def test_numbers_are_rounded_to_what_they_can_tell(
    value: float, metric: MetricInfo, text: str
) -> None:
    assert words.number(value, metric) == text


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([(1, 1)], "round 1; the model still had its initial weights (untrained)"),
        ([(1, 3), (1, 4)], "rounds 3, 4; the model had been trained by the earlier rounds"),
        ([(2, 1)], "round 1; the model had been trained by the earlier rounds"),
        ([(1, 1), (1, 2)], "initial weights in round 1 (untrained), later trained ones"),
    ],
)
def test_it_is_said_whether_the_model_was_trained(places: list[tuple[int, int]], said: str) -> None:
    attacked = [{"attempt": attempt, "round": r} for attempt, r in places]
    assert said in words.rounds(attacked)


def test_the_rounds_of_a_linked_target_all_count() -> None:
    linked = [{"attempt": 1, "round": 2, "rounds": "1,2"}]
    assert words.rounds(linked) == (
        "Attacked: rounds 1, 2; the model had its initial weights in round 1 (untrained), "
        "later trained ones."
    )


@pytest.mark.parametrize(
    ("defense", "adapts", "said"),
    [
        ("", True, "told of no defense"),
        ("noise", False, "told of the defense noise; this attack does not use it"),
        ("noise", True, "told of the defense noise and adapted to it"),
    ],
)
def test_adaptation_is_claimed_only_of_attacks_that_adapt(
    defense: str, adapts: bool, said: str
) -> None:
    assert said in words.told_of(defense, adapts)


def test_attempts_are_drawn_apart() -> None:
    share = [Interval(0.5, 0.4, 0.6, 100)] * 3
    one = str(accuracy_figure([Curve("attempt 1", [0, 1, 2], share)], ""))
    two = str(accuracy_figure([Curve(f"attempt {a}", [0, 1, 2], share) for a in (1, 2)], ""))
    assert "attempt" not in one
    assert "attempt 1" in two
    assert "attempt 2" in two


def test_batch_norm_is_told_of_networks_that_have_it() -> None:
    training = LocalTraining(batch_norm="eval")
    assert "batch norm in eval mode" in words.local_training(training, batch_norm=True)
    assert "batch norm" not in words.local_training(training, batch_norm=False)


def test_batches_of_one_image_are_named_the_easiest_case() -> None:
    assert "one image each, the easiest case" in words.batches([{"images": 1}], None)
    several = words.batches([{"images": 8}, {"images": 20}], LocalTraining(algorithm="fedavg"))
    assert several == (
        "Each attacked target was computed from 8 to 20 images, over several local steps."
    )
    assert "unknown" in words.batches([{"images": None}, {"images": 0}], None)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_keep_every_pixel(channels: int) -> None:
    levels = torch.arange(channels * 20).view(channels, 4, 5) * 3
    address = png(levels / 255)
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert image.size == (5, 4)
    shown = torch.tensor(list(image.tobytes())).view(4, 5, channels).movedim(-1, 0)
    assert torch.equal(shown, levels)


def test_figures_are_described_escaped_and_colored_by_the_page() -> None:
    evil = '<script>&"$x$'
    spread = Spread(evil, [10.0, 11.0, 12.0], mean_interval([10.0, 11.0, 12.0]), False)
    alone = Spread("one", [3.0], mean_interval([3.0]), True)
    share = [Interval(0.5, 0.4, 0.6, 100), Interval(0.7, 0.6, 0.8, 100)]
    for text in (
        str(spread_figure([(evil, [spread, alone])], "dB", evil)),
        str(accuracy_figure([Curve(evil, [0, 1], share), Curve("2", [0, 1], share)], evil)),
    ):
        root = ElementTree.fromstring(text)
        assert root.attrib["aria-label"] == evil
        assert "<script" not in text
        assert "http" not in text.replace("http://www.w3.org/", "")
        assert not any(stand_in in text for stand_in in ("#010101", "#020202", "#030303"))
        assert "var(--ink)" in text
        ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("low", "oracle", "said"),
    [(0.4, (), " The labels leaked: 75 %"), (-0.1, (), ""), (0.4, ("labels",), "")],
)
def test_leaked_labels_are_told_beside_the_pictures(
    low: float, oracle: tuple[str, ...], said: str
) -> None:
    score = SimpleNamespace(
        analysis=SimpleNamespace(config=SimpleNamespace(oracle=oracle)),
        interval=Interval(0.75, 0.58, 0.87, 32),
        gain=Interval(0.6, low, 0.8, 32),
        guess=Interval(0.15, 0.05, 0.3, 32),
    )
    sentence = words.labels_too(score)  # type: ignore[arg-type]
    assert sentence.startswith(said)
    assert bool(sentence) == bool(said)
    assert not said or "a guess gets 15 %" in sentence
    assert words.labels_too(None) == ""

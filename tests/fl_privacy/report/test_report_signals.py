"""Signals in the report: truth and reconstruction as lines on the same axes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_privacy.report import write_report
from fl_privacy.report.signals import MOST, Line, drawing, is_signal, outline
from fl_privacy.types import Samples, Task

MakeRun = Callable[..., Any]
LENGTH = 60


def waves(channels: int = 1) -> Samples:
    t = torch.linspace(0, 12, LENGTH)
    inputs = torch.stack([0.5 + 0.4 * torch.sin(t * (1 + i / 4)) for i in range(8)])
    return Samples(inputs[:, None].repeat(1, channels, 1), torch.arange(8) % 2)


def task_of(channels: int = 1) -> Task:
    half = (0.5,) * channels
    return Task(input_shape=(channels, LENGTH), classes=2, mean=half, std=half)


def near(i: int, target: Any) -> Tensor:
    draw = torch.Generator().manual_seed(i)
    inputs: Tensor = target.truth.inputs
    return (inputs + 0.05 * torch.randn(inputs.shape, generator=draw)).clamp(0, 1)


def gray(i: int, target: Any) -> Tensor:
    return torch.full_like(target.truth.inputs, 0.5)


def drawings(run: Path) -> list[str]:
    page = write_report(run).read_text(encoding="utf-8")
    return re.findall(r'<svg class="signal".*?</svg>', page, re.DOTALL)


def points(polyline: str) -> list[tuple[float, float]]:
    (found,) = re.findall(r'points="([^"]*)"', polyline)
    return [(float(x), float(y)) for x, y in (p.split(",") for p in found.split())]


def test_each_signal_is_drawn_over_the_truth_and_named(synthetic_run: MakeRun) -> None:
    run = synthetic_run(data=waves(), task=task_of(), clients=2, rounds=1, defense="")
    run.add_results("gradient_similarity", near)
    run.add_results("baseline", gray)
    found = drawings(run.path)
    assert len(found) == 2 * 3  # targets, and truth beside two adversaries
    for truth, attack, guess in (found[:3], found[3:]):
        assert truth.count("<polyline") == 1
        assert 'aria-label="truth, class' in truth
        for drawn, color in ((attack, "attack"), (guess, "guess")):
            lines = re.findall(r"<polyline.*?/>", drawn)
            assert [f"var(--{c})" in line for c, line in zip(("truth", color), lines, strict=True)]
            assert points(lines[0]) == points(re.findall(r"<polyline.*?/>", truth)[0])
        assert re.search(r'aria-label="gradient_similarity, class \d, PSNR \d+\.\d dB"', attack)


def test_signals_without_truth_are_lines_alone(synthetic_run: MakeRun) -> None:
    run = synthetic_run(data=waves(), task=task_of(), clients=2, rounds=1, audit=False)
    run.add_results("gradient_similarity", near)
    found = drawings(run.path)
    assert len(found) == 2
    assert all(d.count("<polyline") == 1 and "var(--attack)" in d for d in found)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_where_they_belong(channels: int) -> None:
    signal = torch.tensor([[0.0, 1.0, 0.25, 7.0]]).repeat(channels, 1)
    lines = re.findall(r"<polyline.*?/>", drawing([Line(signal, "attack")], "x"))
    assert len(lines) == channels
    for channel, line in enumerate(lines):
        top = 110 * channel
        heights = [top + 100, top, top + 75, top]  # the last is out of range and cut
        expected = [(x, float(y)) for x, y in zip((0, 100, 200, 300), heights, strict=True)]
        assert points(line) == expected


def test_a_long_signal_keeps_its_peaks_and_its_order() -> None:
    signal = torch.zeros(100_000)
    signal[77_777] = 1.0
    positions, values = outline(signal)
    assert len(positions) <= 2 * MOST
    assert values.max() == 1
    assert positions[values.argmax()].item() == pytest.approx(77_777 / 99_999, abs=1e-6)
    assert (positions.diff() > 0).all()
    short = torch.rand(2 * MOST)
    assert torch.equal(outline(short)[1], short)


def test_the_description_is_escaped() -> None:
    drawn = drawing([Line(torch.rand(1, 5), "attack")], '"><script>')
    assert "<script>" not in drawn
    assert "&#34;&gt;&lt;script&gt;" in drawn


def test_what_is_a_signal() -> None:
    assert is_signal((2, 30))
    assert not any(is_signal(shape) for shape in ((30,), (2, 1), (1, 5, 5)))

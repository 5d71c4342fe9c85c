"""Identifiability: brute force, chance, the gallery, and what is refused before an attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_privacy.analysis import analyze, prepare
from fl_privacy.component import create
from fl_privacy.datasets.embedded import FASHION_MNIST_TASK, FashionMini
from fl_privacy.metrics.identifiability import Identifiability, gallery_of, identified
from fl_privacy.metrics.preparing import MetricError, prepared_metrics
from fl_privacy.metrics.statistics import wilson
from fl_privacy.plan import Plan
from fl_privacy.testing import check_metric, toy_model
from fl_privacy.types import Outcome, Reconstruction, Samples


def draws(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def result(inputs: Tensor) -> Reconstruction:
    return Reconstruction("aa", inputs, torch.zeros(len(inputs)).long(), Outcome("completed"))


def truth(inputs: Tensor) -> Samples:
    return Samples(inputs, torch.zeros(len(inputs)).long())


@pytest.fixture
def toy_gallery(tmp_path: Path) -> str:
    """40 random test images of the toy task's shape, as a data set."""
    draw = np.random.default_rng(5)
    arrays = {
        f"{part}_{split}": draw.random((40, 1, 6, 6), dtype=np.float32)
        if part == "x"
        else np.arange(40) % 4
        for part in ("x", "y")
        for split in ("train", "test")
    }
    np.savez(tmp_path / "gallery.npz", **arrays)  # type: ignore[arg-type]
    return f"npz(path={str(tmp_path / 'gallery.npz')!r})"


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_nearest_of_all_by_brute_force(seed: int) -> None:
    truths, others, noise = draws(seed, (5, 1, 4, 4), (30, 1, 4, 4), (5, 1, 4, 4))
    inputs = (truths + 1.2 * (noise - 0.5)).clamp(0, 1)
    expected = []
    for x, t in zip(inputs, truths, strict=True):
        distances = [float((x - g).square().mean()) for g in [t, *others]]
        expected.append(int(np.argmin(distances)) == 0)
    assert identified(inputs, truths, others, "mse").tolist() == expected


def test_blind_luck_finds_one_in_one_plus_size() -> None:
    size, trials = 3, 1500

    def lucky(seed: int) -> bool:
        inputs, truths, others = draws(seed, (1, 8), (1, 8), (size, 8))
        return bool(identified(inputs, truths, others, "mse"))

    hits = sum(map(lucky, range(trials)))
    share = wilson(hits, trials)
    assert share.low < 1 / (1 + size) < share.high


def test_copies_of_the_truth_are_no_rivals_and_ties_do_not_count() -> None:
    one, other = draws(0, (1, 1, 4, 4), (1, 1, 4, 4))
    assert identified(one, one, torch.cat([one, other]), "mse").tolist() == [True]
    assert identified(other, one, torch.cat([one, other]), "mse").tolist() == [False]
    black, white = torch.zeros(1, 1, 4, 4).double(), torch.ones(1, 1, 4, 4).double()
    assert identified(black + 0.5, black, white, "mse").tolist() == [False]


def test_a_hair_tells_it_from_its_neighbor() -> None:
    """A gallery image one grey level off in one pixel is told apart, dim pictures included."""
    (bright,) = draws(1, (1, 1, 32, 32))
    for pictures in (bright, 1e-3 * bright):
        neighbor = pictures.clone()
        neighbor[0, 0, 3, 3] += 1 / 255
        assert identified(pictures, pictures, neighbor, "mse").tolist() == [True]
        assert identified(neighbor, pictures, neighbor, "mse").tolist() == [False]


def test_the_order_of_a_batch_does_not_matter(toy_gallery: str) -> None:
    metric = Identifiability(gallery=toy_gallery)
    truths, noise = draws(2, (4, 1, 6, 6), (4, 1, 6, 6))
    guesses = truths.clone()
    guesses[:1] = noise[:1]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        (share,) = metric.score([result(guesses[order])], [truth(truths)]).tolist()
        assert share in (0.75, 1.0)
        assert share == metric.score([result(guesses)], [truth(truths)]).item()


def test_it_keeps_the_contract(toy_gallery: str) -> None:
    check_metric(Identifiability(gallery=toy_gallery))


def test_the_gallery_is_a_seeded_draw_without_replacement_from_the_test_split() -> None:
    drawn = gallery_of("fashion-mini", 50, 0)
    assert torch.equal(drawn, gallery_of("fashion-mini", 50, 0))
    assert not torch.equal(drawn, gallery_of("fashion-mini", 50, 1))
    held = FashionMini().load("test").inputs.double().flatten(1)
    places = [int((held - x).abs().sum(1).argmin()) for x in drawn.flatten(1)]
    assert len(set(places)) == 50
    assert torch.equal(held[places], drawn.flatten(1))


def test_the_run_s_own_data_and_the_true_size_are_filled_in() -> None:
    made = prepared_metrics(["identifiability"], "fashion-mini", FASHION_MNIST_TASK)
    assert made["identifiability"] == Identifiability(gallery="fashion-mini", size=600)


def test_an_analysis_scores_it_and_says_what_the_gallery_was(run: Path, toy_gallery: str) -> None:
    spec = f"identifiability(gallery={toy_gallery!r}, size=30)"
    exact = analyze(run, Plan(adversary="analytic", metrics=(spec,)), model=toy_model)
    assert [row[spec] for row in exact.rows()] == [1.0] * 6
    (info,) = exact.config.metrics
    assert info.is_share
    assert "size=30" in info.spec
    guess = analyze(run, Plan(adversary="baseline", metrics=(spec,)), model=toy_model)
    assert sum(row[spec] for row in guess.rows()) <= 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("identifiability", "the recording names no data set"),
        ("identifiability(gallery='fashion-mini')", r"expected inputs .*\(1, 6, 6\).*28"),
    ],
)
def test_a_gallery_that_does_not_serve_is_refused_before_the_attack(
    run: Path, spec: str, said: str
) -> None:
    with pytest.raises(MetricError, match=said):
        prepare(run, Plan(adversary="analytic", metrics=(spec,)), model=toy_model)
    assert not (run / "results").exists()


def test_perceptual_distance_needs_images(tmp_path: Path) -> None:
    signals = np.random.default_rng(0).random((4, 9), dtype=np.float32)
    classes = np.arange(4) % 2
    np.savez(
        tmp_path / "signals.npz",
        x_train=signals,
        x_test=signals,
        y_train=classes,
        y_test=classes,
    )
    gallery = f"npz(path={str(tmp_path / 'signals.npz')!r})"
    task = create("datasets", gallery).task()
    spec = f"identifiability(gallery={gallery!r}, distance='lpips')"
    with pytest.raises(MetricError, match="needs images, got inputs of shape"):
        prepared_metrics([spec], "", task)


def test_perceptual_distance_decides_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in distance that sees only the first pixel."""

    def first_pixel(inputs: Tensor, truth: Tensor) -> Tensor:
        return (inputs - truth)[:, 0, 0, 0].abs()

    here: Callable[[Tensor, Tensor], Tensor] = first_pixel
    monkeypatch.setattr("fl_privacy.metrics.identifiability.lpips_each", here)
    inputs, truths, others = (
        torch.zeros(1, 1, 4, 4),
        torch.ones(1, 1, 4, 4),
        torch.zeros(3, 1, 4, 4),
    )
    truths[..., 0, 0], others[..., 0, 0] = 0.1, 0.2
    assert identified(inputs, truths, others, "lpips").tolist() == [True]
    assert identified(inputs, truths, others, "mse").tolist() == [False]

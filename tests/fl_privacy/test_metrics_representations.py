"""Correlations against numpy, with the network the client was sent; classes as sets."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fl_privacy import attack_command
from fl_privacy.analysis import analyze, execute
from fl_privacy.baseline_job import prepare_baseline
from fl_privacy.metrics.preparing import MetricError, check_observed
from fl_privacy.metrics.representations import (
    ClassPrecision,
    ClassRecall,
    RepresentationCorrelation,
    pearson,
)
from fl_privacy.plan import Plan
from fl_privacy.report import write_report
from fl_privacy.testing import check_metric, toy_model, toy_observations, toy_samples
from fl_privacy.testing.toys import TASK
from fl_privacy.types import (
    Observation,
    Outcome,
    Reconstruction,
    Representations,
    Samples,
)

DONE = Outcome("completed")


@pytest.fixture
def observation() -> Observation:
    observations, _ = toy_observations(1)
    return observations[0]


def inferred(classes: list[int], layers: dict[str, Tensor]) -> Representations:
    return Representations("k", torch.tensor(classes, dtype=torch.int64), layers, DONE)


def seen(inputs: Tensor) -> dict[str, np.ndarray]:
    """What the two dense layers of the toy network see, by hand."""
    flat = TASK.normalize(inputs).flatten(1)
    network = toy_model()
    assert isinstance(network, nn.Sequential)
    with torch.no_grad():
        return {"1": flat.numpy(), "3": network[:3](TASK.normalize(inputs)).numpy()}


def truth() -> Samples:
    return Samples(toy_samples(6).inputs, torch.tensor([0, 2, 2, 0, 2, 3]))


def score(metric: RepresentationCorrelation, result: object, observation: Observation) -> float:
    return float(
        metric.score_observed([result], [truth()], [observation])  # type: ignore[list-item]
    )


def test_pearson_is_numpys() -> None:
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert pearson(3 * a + 2, a) == pytest.approx(1)
    assert pearson(-a, a) == pytest.approx(-1)
    assert pearson(torch.ones(50), b) == 0
    assert np.isnan(pearson(a, torch.ones(50)))


@pytest.mark.parametrize("layer", ["1", "3"])
def test_score_is_the_mean_over_classes_of_numpys_corrcoef(
    observation: Observation, layer: str
) -> None:
    held, draw = truth(), torch.Generator().manual_seed(3)
    guess = torch.rand(3, {"1": 36, "3": 16}[layer], generator=draw)
    result = inferred([0, 2, 3], {layer: guess})
    values = seen(held.inputs)[layer]
    means = [values[held.labels.numpy() == c].mean(0) for c in (0, 2, 3)]

    def expected(order: list[int]) -> float:
        pairs = zip(guess.numpy(), [means[i] for i in order], strict=True)
        return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))

    own, other = (RepresentationCorrelation(layer=layer, truth=t) for t in ("own", "other"))
    assert score(own, result, observation) == pytest.approx(expected([0, 1, 2]), abs=1e-6)
    assert score(other, result, observation) == pytest.approx(expected([1, 2, 0]), abs=1e-6)
    exact = inferred([0, 2, 3], {layer: torch.tensor(np.stack(means))})
    assert score(own, exact, observation) == pytest.approx(1, abs=1e-6)


def test_classes_that_are_missed_count_as_zero_and_strangers_do_not_count(
    observation: Observation,
) -> None:
    values, held = seen(truth().inputs), truth()
    means = {n: [v[held.labels.numpy() == c].mean(0) for c in (0, 2, 3)] for n, v in values.items()}
    layers = {n: torch.tensor(np.stack([m[0], m[2], m[1]])) for n, m in means.items()}
    result = inferred([0, 1, 3], layers)  # class 2 is missed, 1 is not there, 3 is given 2's
    first = np.mean([1, 0, np.corrcoef(means["1"][1], means["1"][2])[0, 1]])
    last = np.mean([1, 0, np.corrcoef(means["3"][1], means["3"][2])[0, 1]])
    assert score(RepresentationCorrelation(layer="1"), result, observation) == pytest.approx(first)
    assert score(RepresentationCorrelation(), result, observation) == pytest.approx(
        (first + last) / 2, abs=1e-6
    )


def test_without_the_layer_or_a_second_class_there_is_no_score(observation: Observation) -> None:
    result = inferred([0], {"3": torch.rand(1, 16)})
    assert np.isnan(score(RepresentationCorrelation(), result, observation))
    alone = Samples(toy_samples(2).inputs, torch.zeros(2, dtype=torch.int64))
    other = RepresentationCorrelation(layer="3", truth="other")
    assert np.isnan(float(other.score_observed([result], [alone], [observation])))


def test_truth_is_what_the_sent_network_sees(observation: Observation) -> None:
    values, held = seen(truth().inputs), truth()
    means = np.stack([values["3"][held.labels.numpy() == c].mean(0) for c in (0, 2, 3)])
    result = inferred([0, 2, 3], {"3": torch.tensor(means)})
    (exchange,) = observation.exchanges
    fresh = {n: torch.randn(t.shape) for n, t in exchange.parameters.items()}
    elsewhere = replace(observation, exchanges=(replace(exchange, parameters=fresh),))
    metric = RepresentationCorrelation(layer="3")
    assert score(metric, result, observation) > 1 - 1e-6
    assert score(metric, result, elsewhere) < 0.9


def test_reconstructed_inputs_are_sent_through_the_network(observation: Observation) -> None:
    held = truth()
    exact = Reconstruction("k", held.inputs.flip(0), held.labels.flip(0), DONE)
    assert score(RepresentationCorrelation(), exact, observation) == pytest.approx(1)


def test_classes_are_compared_as_sets() -> None:
    result = inferred([0, 1, 2, 3], {})
    held = truth()
    assert float(ClassPrecision().score([result], [held])) == 0.75
    assert float(ClassRecall().score([result], [held])) == 1
    fewer = Reconstruction("k", held.inputs, torch.tensor([2, 2, 2, 2, 2, 1]), DONE)
    assert float(ClassPrecision().score([fewer], [held])) == 0.5
    assert float(ClassRecall().score([fewer], [held])) == pytest.approx(1 / 3)
    assert np.isnan(float(ClassPrecision().score([inferred([], {})], [held])))


def test_they_keep_the_contract() -> None:
    for metric in (RepresentationCorrelation(), ClassPrecision(), ClassRecall()):
        check_metric(metric)


def test_an_unknown_layer_is_refused_before_the_attack_with_those_there_are(
    observation: Observation, run: Path
) -> None:
    with pytest.raises(MetricError, match=r"layer='fc1'.*: expected one of .* 1, 3"):
        check_observed([RepresentationCorrelation(layer="fc1")], observation)
    wanted = ("representation_correlation(layer='fc1')",)
    with pytest.raises(MetricError, match="1, 3"):
        analyze(run, Plan(adversary="analytic", metrics=wanted), model=toy_model)
    assert not (run / "results").exists()
    bare = replace(observation, model=lambda: nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten()))
    with pytest.raises(MetricError, match="leave this score out"):
        RepresentationCorrelation().check_observed(bare)
    with pytest.raises(MetricError, match="observations"):
        RepresentationCorrelation().score([], [])


def test_an_analysis_scores_it_beside_the_guess_and_reports_without_pictures(run: Path) -> None:
    plan = Plan(
        adversary="representation_inference",
        metrics=("psnr", "representation_correlation", "class_precision", "class_recall"),
    )
    rows = analyze(run, plan, model=toy_model).rows()
    assert all(row["psnr"] is None for row in rows)
    assert all(row["class_precision"] == row["class_recall"] == 1 for row in rows)
    exact = [row["representation_correlation"] for row in rows]
    assert min(exact) > 0.999
    job, _ = prepare_baseline(run, plan, model=toy_model)
    guessed = [row["representation_correlation"] for row in execute(job).rows()]
    assert max(guessed) < 0.9
    page = write_report(run).read_text()
    assert "representation inference" in page
    assert "representation correlation" in page
    assert "No attack reconstructed inputs" in page


def test_the_terminal_shows_the_scores_that_the_attack_has(run: Path) -> None:
    plan = Plan(adversary="representation_inference", metrics=("psnr", "class_recall"))
    results = [analyze(run, plan, model=toy_model)]
    results.append(execute(prepare_baseline(run, plan, model=toy_model)[0]))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attack_command.scores(results))
    shown = console.export_text()
    assert "class recall" in shown
    assert "psnr" not in shown
    console.print(attack_command.scores(results[::-1]))
    assert "psnr" in console.export_text()

"""What an attack has to beat: the guesses, and retrieval by the gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.baseline import Baseline
from adversaries.nearest_image import NearestImage, draw
from fl_privacy.testing import check_adversary, toy_model, toy_observations, toy_samples
from fl_privacy.testing.toys import TASK
from fl_privacy.types import Failure, LocalTraining, Observation, Reconstruction, Samples

CPU = torch.device("cpu")
Observe = Callable[..., list[Observation]]


def attacked(
    adversary: Baseline | NearestImage, observations: Sequence[Observation], auxiliary: Samples
) -> list[Reconstruction]:
    granted = [replace(o, auxiliary=auxiliary) for o in observations]
    results = list(adversary.attack(granted, seed=0, device=CPU))
    return [r for r in results if isinstance(r, Reconstruction)]


def pictures(count: int, seed: int) -> Tensor:
    return toy_samples(count, seed=seed).inputs


def pool(*inputs: Tensor) -> Samples:
    """Auxiliary data: each set of inputs with labels in turn, as `observe` gives them."""
    labels = [torch.arange(len(x)) % TASK.classes for x in inputs]
    return Samples(torch.cat(inputs), torch.cat(labels))


def slope(inputs: Tensor, labels: Tensor) -> Tensor:
    model = toy_model()
    loss = F.cross_entropy(model(TASK.normalize(inputs)), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_a_true_image_among_the_candidates_is_found() -> None:
    observations, truths = toy_observations(4)
    auxiliary = pool(pictures(40, 7), torch.cat([t.inputs for t in truths]))
    found = attacked(NearestImage(), observations, auxiliary)
    assert len(found) == 4
    for result, truth in zip(found, truths, strict=True):
        assert torch.equal(result.inputs, truth.inputs)
        assert torch.equal(result.labels, truth.labels)
        assert result.loss == pytest.approx(0, abs=1e-6)  # a cosine of 1


def test_the_answer_has_the_largest_cosine_of_its_label() -> None:
    observations, truths = toy_observations(4)
    auxiliary = pool(pictures(60, 3))
    for together in (1, 7, 25):
        found = attacked(NearestImage(together=together), observations, auxiliary)
        for result, truth in zip(found, truths, strict=True):
            (label,) = truth.labels.tolist()
            seen = slope(truth.inputs, truth.labels)
            mine = auxiliary.inputs[auxiliary.labels == label]
            cosines = [
                float(F.cosine_similarity(slope(x[None], truth.labels), seen, dim=0)) for x in mine
            ]
            assert torch.equal(result.inputs[0], mine[int(torch.tensor(cosines).argmax())])
            assert result.loss == pytest.approx(1 - max(cosines), abs=1e-5)


def test_a_batch_never_gets_a_candidate_twice(observe: Observe) -> None:
    held = pictures(4, 0)[[0, 1, 0, 1]]  # labels 0, 1, 2, 3 in turn
    (target,) = observe(toy_model, TASK, held, images=4, training=LocalTraining(batch_size=4))
    told = replace(target, labels=torch.tensor([1, 0, 1, 1]))
    auxiliary = pool(pictures(40, 5))
    (result,) = attacked(NearestImage(), [told], auxiliary)
    assert result.labels.tolist() == [1, 0, 1, 1]
    places = [(auxiliary.inputs == x).flatten(1).all(1).nonzero().item() for x in result.inputs]
    assert len(set(places)) == 4
    assert auxiliary.labels[places].tolist() == [1, 0, 1, 1]


def test_too_few_candidates_are_a_failure_that_says_so() -> None:
    observations, _ = toy_observations(1)
    other = Samples(pictures(3, 1), torch.full((3,), 2))
    target = replace(observations[0], auxiliary=other)
    (result,) = NearestImage().attack([target], seed=0, device=CPU)
    assert isinstance(result, Failure)
    assert "of class 0 are wanted and 0 candidates are there" in result.reason


def test_several_local_steps_are_taken_for_one(observe: Observe) -> None:
    training = LocalTraining(algorithm="fedavg", epochs=3, lr=1e-3)
    inputs = pictures(4, 2)
    observations = observe(toy_model, TASK, inputs, training=training)
    auxiliary = pool(pictures(40, 7), inputs)
    found = attacked(NearestImage(), observations, auxiliary)
    for i, result in enumerate(found):  # at a small step the gradient hardly turns
        assert torch.equal(result.inputs[0], inputs[i])
        assert 0 < result.loss < 1e-3


def test_withheld_layers_are_left_out_of_the_cosine() -> None:
    observations, truths = toy_observations(4)
    hidden = [replace(o, withheld=("1.weight", "1.bias")) for o in observations]
    auxiliary = pool(pictures(40, 7), torch.cat([t.inputs for t in truths]))
    found = attacked(NearestImage(), hidden, auxiliary)
    assert all(r.loss == pytest.approx(0, abs=1e-6) for r in found)
    assert all(torch.equal(r.inputs, t.inputs) for r, t in zip(found, truths, strict=True))


def test_candidates_are_a_seeded_draw_of_one_label() -> None:
    labels = torch.arange(100) % 5
    mine = draw(labels, 3, 8, seed=1)
    assert labels[mine].tolist() == [3] * 8
    assert len(set(mine.tolist())) == 8
    assert torch.equal(mine, draw(labels, 3, 8, seed=1))
    assert not torch.equal(mine, draw(labels, 3, 8, seed=2))
    assert sorted(draw(labels, 3, 1000, seed=1).tolist()) == list(range(3, 100, 5))


def test_a_network_that_cannot_take_one_image_is_refused(observe: Observe) -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return made()

    def made() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    training = LocalTraining(batch_size=2)
    (target,) = observe(build, TASK, pictures(2, 0), images=2, training=training)
    target = replace(target, auxiliary=pool(pictures(8, 1)))
    (result,) = NearestImage().attack([target], seed=0, device=CPU)
    assert isinstance(result, Failure)
    assert "batch norm may need batch_norm='eval'" in result.reason


def test_it_keeps_the_contract() -> None:
    check_adversary(NearestImage())


def test_the_mean_and_the_best_constant_have_the_least_squared_error() -> None:
    observations, _ = toy_observations(1)
    auxiliary = pool(pictures(30, 4) * torch.linspace(0.2, 1, 6))

    def error(picture: Tensor) -> float:
        return float((auxiliary.inputs - picture).square().mean())

    (mean,) = attacked(Baseline(guess="mean"), observations, auxiliary)
    (constant,) = attacked(Baseline(guess="constant"), observations, auxiliary)
    (auto,) = attacked(Baseline(), observations, auxiliary)
    assert torch.equal(auto.inputs, mean.inputs)
    assert float(constant.inputs.std()) == pytest.approx(0, abs=1e-6)
    assert error(mean.inputs) < error(constant.inputs)
    for step in (-0.01, 0.01):
        assert error(constant.inputs) < error(constant.inputs + step)
        assert error(mean.inputs) < error(mean.inputs + step)


def test_a_constant_has_a_level_for_each_channel() -> None:
    observations, _ = toy_observations(1)
    task = TASK.model_copy(
        update={"input_shape": (3, 2, 2), "mean": (0.1, 0.2, 0.3), "std": (1.0,) * 3}
    )
    target = replace(observations[0], task=task)
    levels = torch.tensor([0.9, 0.5, 0.1]).view(3, 1, 1)
    auxiliary = Samples(levels.expand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))
    (told,) = attacked(Baseline(guess="constant"), [target], auxiliary)
    assert torch.allclose(told.inputs[0], levels.expand(3, 2, 2))
    (blind,) = Baseline(guess="constant").attack([target], seed=0, device=CPU)
    assert isinstance(blind, Reconstruction)
    assert torch.allclose(blind.inputs[0, :, 0, 0], torch.tensor(task.mean))

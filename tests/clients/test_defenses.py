"""The first defenses: against plain loops and distributions, pure, twice differentiable."""

import math

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import grad, vmap

from clients.defending import defend_update, step_of
from clients.defenses.gaussian_noise import GaussianNoise
from clients.defenses.per_sample_clipping import PerSampleClipping
from fl_privacy.component import ComponentError, create_all
from fl_privacy.defenses import per_sample_loss, split_defenses
from fl_privacy.models.mlp import MLP
from fl_privacy.models.soteria import ConvNet64
from fl_privacy.models.zhu import LeNetZhu
from fl_privacy.protocols import GradientDefense, UpdateDefense
from fl_privacy.types import Samples, Stats, Step, Task, Tensors

TASK = Task(input_shape=(1, 4, 4), classes=3, mean=(0.0,), std=(1.0,))
LABELS = torch.tensor([0, 2, 1, 1, 0])
LARGEST = 1e6
"""A bound no gradient here reaches."""


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def step(expected_batch_size: int = 5) -> Step:
    model = LeNetZhu().build(TASK, seed=0).double()
    inputs = torch.rand(5, 1, 4, 4, generator=seeded(1), dtype=torch.float64)
    return step_of(model, TASK, Samples(inputs, LABELS), expected_batch_size=expected_batch_size)


def sample_gradients(of: Step) -> list[dict[str, Tensor]]:
    """One backward pass a sample: the plain loop."""
    names, parameters = zip(*of.model.named_parameters(), strict=True)
    gradients = []
    for i in range(len(of.labels)):
        loss = per_sample_loss(of.model(of.inputs[i : i + 1]), of.labels[i : i + 1]).sum()
        values = torch.autograd.grad(loss, parameters)
        gradients.append(dict(zip(names, values, strict=True)))
    return gradients


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))


def middle_norm() -> float:
    """A bound that clips some of the samples and not others."""
    return sorted(norm(gradient) for gradient in sample_gradients(step()))[2] * 1.001


def test_defenses_satisfy_one_protocol_each() -> None:
    noise, clipping = GaussianNoise(scale=1.0), PerSampleClipping(max_norm=1.0)
    assert isinstance(noise, UpdateDefense)
    assert not isinstance(noise, GradientDefense)
    assert isinstance(clipping, GradientDefense)
    assert not isinstance(clipping, UpdateDefense)


@pytest.mark.parametrize("expected_batch_size", [5, 8])
def test_clipping_equals_a_loop_over_the_samples(expected_batch_size: int) -> None:
    of, bound = step(expected_batch_size), middle_norm()
    defended, stats = PerSampleClipping(max_norm=bound).defend_gradient(of, generator=seeded())
    gradients = sample_gradients(of)
    for name, value in defended.items():
        clipped = [g[name] * min(1.0, bound / norm(g)) for g in gradients]
        expected = torch.stack(clipped).sum(0) / expected_batch_size
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert float(stats["clipped_share"]) == pytest.approx(2 / 5)
    assert float(stats["mean_norm"]) == pytest.approx(sum(map(norm, gradients)) / 5)


@pytest.mark.parametrize("bound", [1e-3, 0.5, LARGEST])
def test_a_clipped_mean_is_never_longer_than_the_bound(bound: float) -> None:
    defended, _ = PerSampleClipping(max_norm=bound).defend_gradient(step(), generator=seeded())
    assert norm(dict(defended)) <= bound * (1 + 1e-12)


def test_a_bound_that_no_sample_reaches_changes_nothing() -> None:
    of = step()
    defended, stats = PerSampleClipping(max_norm=LARGEST).defend_gradient(of, generator=seeded())
    loss = per_sample_loss(of.model(of.inputs), of.labels).mean()
    plain = torch.autograd.grad(loss, list(of.model.parameters()))
    for value, expected in zip(defended.values(), plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert float(stats["clipped_share"]) == 0


def test_a_sample_without_gradient_is_no_division_by_zero() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    of = step_of(model, TASK, Samples(torch.zeros(2, 1, 2, 2), LABELS[:2]), expected_batch_size=2)
    silent = Step(**{**vars(of), "loss": lambda outputs, labels: 0 * outputs.sum(1)})
    defended, _ = PerSampleClipping(max_norm=1.0).defend_gradient(silent, generator=seeded())
    assert all(torch.equal(value, torch.zeros_like(value)) for value in defended.values())


def test_clipping_is_pure() -> None:
    of = step()
    before = {name: value.clone() for name, value in of.model.state_dict().items()}
    first, _ = PerSampleClipping(max_norm=0.5).defend_gradient(of, generator=seeded(0))
    again, _ = PerSampleClipping(max_norm=0.5).defend_gradient(of, generator=seeded(1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in of.model.state_dict().items())
    assert all(parameter.grad is None for parameter in of.model.parameters())


@pytest.mark.parametrize("bound", [0.05, LARGEST])
def test_clipping_is_twice_differentiable_in_the_inputs(bound: float) -> None:
    model = MLP(hidden=(3,)).build(TASK, seed=0).double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            model.set_submodule("relu1", nn.Sigmoid())
    inputs = torch.rand(2, 1, 4, 4, generator=seeded(1), dtype=torch.float64, requires_grad=True)

    def defended(x: Tensor) -> Tensor:
        of = step_of(model, TASK, Samples(x, LABELS[:2]), expected_batch_size=2)
        gradient, _ = PerSampleClipping(max_norm=bound).defend_gradient(of, generator=seeded())
        return torch.cat([value.flatten() for value in gradient.values()])

    assert torch.autograd.gradcheck(defended, (inputs,))
    assert torch.autograd.gradgradcheck(defended, (inputs,))


def test_an_adversary_can_run_clipping_inside_vmap_and_grad() -> None:
    of = step()

    def objective(x: Tensor) -> Tensor:
        inside = Step(**{**vars(of), "inputs": x})
        gradient, _ = PerSampleClipping(max_norm=0.5).defend_gradient(inside, generator=seeded())
        return torch.stack([value.square().sum() for value in gradient.values()]).sum()

    targets = torch.rand(3, 5, 1, 4, 4, generator=seeded(2), dtype=torch.float64)
    batched = vmap(grad(objective))(targets)
    alone = torch.stack([grad(objective)(x) for x in targets])
    torch.testing.assert_close(batched, alone)


def test_clipping_refuses_batch_norm_in_train_mode_and_names_it() -> None:
    task = Task(input_shape=(1, 9, 9), classes=3, mean=(0.0,), std=(1.0,))
    model = ConvNet64().build(task, seed=0)
    samples = Samples(torch.rand(2, 1, 9, 9, generator=seeded()), LABELS[:2])
    of = step_of(model, task, samples, expected_batch_size=2)
    with pytest.raises(ValueError, match=r"features\.bn1, .*batch-norm to eval"):
        PerSampleClipping(max_norm=1.0).defend_gradient(of, generator=seeded())
    model.eval()
    defended, _ = PerSampleClipping(max_norm=1.0).defend_gradient(of, generator=seeded())
    assert norm(dict(defended)) <= 1 + 1e-5


def update() -> dict[str, Tensor]:
    return {"weight": torch.full((200, 200), 2.0), "bias": torch.zeros(200)}


def test_noise_is_gaussian_with_the_scale_as_standard_deviation() -> None:
    noisy, stats = GaussianNoise(scale=0.5).defend_update(update(), generator=seeded())
    noise = torch.cat([(noisy[n] - value).flatten() for n, value in update().items()]).double()
    n = len(noise)
    assert abs(float(noise.mean())) < 5 * 0.5 / math.sqrt(n)
    assert float(noise.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * n))
    kurtosis = float((noise**4).mean() / noise.var() ** 2)
    assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / n))
    assert float(stats["update_norm"]) == pytest.approx(400)
    assert float(stats["expected_noise_norm"]) == pytest.approx(0.5 * math.sqrt(n))
    assert float(stats["snr"]) == pytest.approx(400 / (0.5 * math.sqrt(n)))


def test_no_noise_changes_nothing_and_states_no_ratio() -> None:
    noisy, stats = GaussianNoise(scale=0.0).defend_update(update(), generator=seeded())
    assert all(torch.equal(noisy[name], value) for name, value in update().items())
    assert "snr" not in stats


def test_noise_comes_from_the_generator_alone_and_keeps_type_and_input() -> None:
    given = {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float16)}
    before = torch.get_rng_state()
    first, _ = GaussianNoise(scale=1.0).defend_update(given, generator=seeded(1))
    again, _ = GaussianNoise(scale=1.0).defend_update(given, generator=seeded(1))
    other, _ = GaussianNoise(scale=1.0).defend_update(given, generator=seeded(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in given.items():
        assert torch.equal(value, torch.ones_like(value))
        assert first[name].dtype == value.dtype
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_noise_is_differentiable_in_the_update() -> None:
    value = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def squared(x: Tensor) -> Tensor:
        noisy, _ = GaussianNoise(scale=0.3).defend_update({"a": x}, generator=seeded())
        return noisy["a"] ** 3

    assert torch.autograd.gradcheck(squared, (value,))
    assert torch.autograd.gradgradcheck(squared, (value,))


class Halving:
    """An update defense for tests."""

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        return {name: value / 2 for name, value in update.items()}, {"names": len(update)}


def test_update_defenses_see_the_named_differences_in_turn() -> None:
    sent = {"weight": torch.tensor([1.0, 2.0]), "count": torch.tensor([3])}
    returned = {"weight": torch.tensor([5.0, -2.0]), "count": torch.tensor([4])}
    state, stats = defend_update(
        sent, returned, (Halving(), Halving()), names=["weight"], generator=seeded()
    )
    assert state["weight"].tolist() == [2.0, 1.0]
    assert state["count"].tolist() == [4]
    assert stats == {"Halving/names": 1.0}


def test_without_a_defense_what_is_returned_stays_bit_identical() -> None:
    sent = {"weight": torch.rand(50, generator=seeded(1)) * 1e6}
    returned = {"weight": torch.rand(50, generator=seeded(2))}
    state, stats = defend_update(sent, returned, (), names=["weight"], generator=seeded())
    assert torch.equal(state["weight"], returned["weight"])
    assert stats == {}


def test_one_gradient_defense_may_come_first() -> None:
    spec = "per_sample_clipping(max_norm=1.0)+gaussian_noise(scale=0.1)+gaussian_noise(scale=0.2)"
    gradient, updates = split_defenses(create_all("defenses", spec))
    assert gradient == PerSampleClipping(max_norm=1.0)
    assert updates == (GaussianNoise(scale=0.1), GaussianNoise(scale=0.2))
    assert split_defenses(()) == (None, ())


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian_noise(scale=0.1)+per_sample_clipping(max_norm=1.0)",
        "per_sample_clipping(max_norm=1.0)+per_sample_clipping(max_norm=1.0)",
    ],
)
def test_other_orders_are_refused(spec: str) -> None:
    with pytest.raises(ComponentError, match=r"at most one gradient defense.*per_sample_clipping"):
        split_defenses(create_all("defenses", spec))


@pytest.mark.parametrize(
    "spec",
    ["gaussian_noise", "gaussian_noise(scale=-1)", "per_sample_clipping(max_norm=0)"],
)
def test_missing_and_senseless_settings_are_refused(spec: str) -> None:
    with pytest.raises(ComponentError, match=r"scale|max_norm"):
        create_all("defenses", spec)

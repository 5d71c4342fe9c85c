"""DP-SGD against Opacus, its budget, and what it refuses."""

import math
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import Generator, Tensor, nn

from clients.accounting import AccountingError, epsilon_of, noise_for, participations_within
from clients.defending import step_of
from clients.defenses.dp_sgd import DPSGD
from clients.defenses.per_sample_clipping import PerSampleClipping, per_sample_gradients
from clients.private_training import planned, steps_of
from clients.training import local_train
from fl_privacy.component import create, spec_of
from fl_privacy.defenses import per_sample_loss
from fl_privacy.metrics.epsilon_bound import gaussian_epsilon
from fl_privacy.models.soteria import ConvNet64
from fl_privacy.models.zhu import LeNetZhu
from fl_privacy.privacy_spent import NoisySteps
from fl_privacy.testing import check_defense, toy_step
from fl_privacy.types import LocalTraining, Samples, Step, Task

TASK = Task(input_shape=(1, 8, 8), classes=4, mean=(0.0,), std=(1.0,))
DELTA = 1e-5


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def samples(n: int = 6) -> Samples:
    return Samples(torch.rand(n, 1, 8, 8, generator=seeded(1)), torch.arange(n) % 4)


def step(nominal: int = 8) -> Step:
    model = LeNetZhu().build(TASK, seed=0)
    return step_of(model, TASK, samples(), expected_batch_size=nominal)


def noisy(noise: float, rate: float = 1.0, count: int = 1) -> NoisySteps:
    return NoisySteps(noise_multiplier=noise, sample_rate=rate, count=count)


def opacus_gradient(of: Step, max_norm: float, noise: float, draws: Generator) -> dict[str, Tensor]:
    """The gradient that Opacus' optimizer would step along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = GradSampleModule(of.model, loss_reduction="mean")
        optimizer = DPOptimizer(
            torch.optim.SGD(module.parameters(), lr=0.1),
            noise_multiplier=noise,
            max_grad_norm=max_norm,
            expected_batch_size=of.expected_batch_size,
            generator=draws,
        )
        loss = per_sample_loss(module(of.inputs), of.labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.pre_step()
    gradient = {
        name.removeprefix("_module."): parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
    }
    module.to_standard_module()
    return gradient


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
def test_without_noise_the_gradient_is_that_of_opacus(max_norm: float) -> None:
    of = step()
    ours, _ = DPSGD(noise_multiplier=0.0, max_norm=max_norm).defend_gradient(of, generator=seeded())
    theirs = opacus_gradient(of, max_norm, 0.0, seeded())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_noise_has_the_variance_of_opacus() -> None:
    """Both standard deviations are noise * max_norm / batch, within five standard errors."""
    of, expected = step(nominal=8), 1.5 * 0.4 / 8
    calm = DPSGD(noise_multiplier=0.0, max_norm=0.4).defend_gradient(of, generator=seeded())[0]
    ours = DPSGD(noise_multiplier=1.5, max_norm=0.4).defend_gradient(of, generator=seeded())[0]
    theirs = opacus_gradient(of, 0.4, 1.5, seeded(5))
    for gradient in (ours, theirs):
        noise = torch.cat([(gradient[name] - calm[name]).flatten() for name in calm]).double()
        error = 5 / math.sqrt(2 * len(noise))
        assert float(noise.std()) == pytest.approx(expected, rel=error)
        assert abs(float(noise.mean())) < 5 * expected / math.sqrt(len(noise))


def test_it_is_a_conforming_defense_and_an_empty_batch_is_noise_alone() -> None:
    defense = DPSGD(noise_multiplier=2.0)
    check_defense(defense)
    of = toy_step(4)
    empty = replace(of, inputs=of.inputs[:0], labels=of.labels[:0])
    defended, stats = defense.defend_gradient(empty, generator=seeded())
    noise = torch.cat([value.flatten() for value in defended.values()])
    assert float(noise.std()) == pytest.approx(2.0 / 4, rel=5 / math.sqrt(2 * len(noise)))
    assert all(math.isfinite(float(value)) for value in stats.values())


def test_a_client_trains_on_poisson_batches_of_which_some_are_empty() -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=1, epochs=3, lr=0.1)
    model = LeNetZhu().build(TASK, seed=0)
    sizes: list[int] = []
    local_train(
        model,
        TASK,
        samples(),
        training,
        generator=seeded(),
        gradient_defense=DPSGD(),
        defense_generator=seeded(1),
        on_step=lambda number, batch, indices: sizes.append(len(indices)),
    )
    assert len(sizes) == 18
    assert 0 in sizes
    assert max(sizes) > 1
    assert steps_of(training, 6, noise=1.0) == noisy(1.0, 1 / 6, 18)


def test_batch_norm_is_refused_with_its_layers_and_the_fix() -> None:
    task = Task(input_shape=(1, 9, 9), classes=4, mean=(0.0,), std=(1.0,))
    model = ConvNet64().build(task, seed=0)
    few = Samples(torch.rand(2, 1, 9, 9, generator=seeded()), torch.tensor([0, 1]))
    of = step_of(model, task, few, expected_batch_size=2)
    with pytest.raises(ValueError, match=r"features\.bn1, .*batch-norm to eval.*GroupNorm"):
        DPSGD().defend_gradient(of, generator=seeded())


def test_statistics_of_the_data_that_move_with_it_are_refused() -> None:
    """Running statistics would leave the client without any noise."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(),
        nn.Linear(72, 4),
    )  # fmt: skip
    of = step_of(model, TASK, samples(), expected_batch_size=6)
    with pytest.raises(RuntimeError):
        DPSGD().defend_gradient(of, generator=seeded())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_gradient_that_is_not_finite_is_left_out(bad: float) -> None:
    """Else a server learns from one NaN whether the sample that overflows is there."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    of, defense = (
        step_of(model, TASK, samples(), expected_batch_size=6),
        PerSampleClipping(max_norm=1.0),
    )
    spoiled = replace(of, inputs=of.inputs.clone())
    spoiled.inputs[2] = bad
    found, stats = defense.defend_gradient(spoiled, generator=seeded())
    others = torch.tensor([0, 1, 3, 4, 5])
    without = replace(of, inputs=of.inputs[others], labels=of.labels[others])
    expected, _ = defense.defend_gradient(without, generator=seeded())
    torch.testing.assert_close(found, expected)
    assert all(math.isfinite(float(value)) for value in stats.values())


def test_dropout_is_drawn_for_each_sample_by_itself() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 1000, bias=False))
    same = Samples(torch.ones(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gradients = per_sample_gradients(step_of(model, TASK, same, expected_batch_size=2))
    dropped = (gradients["2.weight"] == 0).all(1)
    assert 40 < int(dropped.sum()) < 90
    assert not torch.equal(dropped[0], dropped[1])


def test_the_settings_are_written_and_read() -> None:
    defense = create("defenses", "dp_sgd(epsilon=8.0, max_norm=0.5)")
    assert create("defenses", spec_of("defenses", defense)) == defense
    assert create("defenses", "dp_sgd").noise == 1.0
    with pytest.raises(ValueError, match="no noise multiplier before a client knows"):
        defense.defend_gradient(step(), generator=seeded())


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_one_full_step_is_the_gaussian_mechanism(noise: float) -> None:
    """PRV is within 0.01 above the exact epsilon of Balle and Wang; RDP is an upper bound."""
    exact = gaussian_epsilon(noise, DELTA)
    prv, rdp = (epsilon_of([noisy(noise)], DELTA, name) for name in ("prv", "rdp"))
    assert 0 <= prv - exact < 1e-2
    assert rdp > exact


def test_epsilon_of_a_mixed_history_is_that_of_opacus() -> None:
    history = [noisy(1.0, 0.1, 20), noisy(2.0, 0.3, 5), noisy(1.5, 0.02, 100)]
    for accountant, name in ((RDPAccountant(), "rdp"), (PRVAccountant(), "prv")):
        for part in history:
            for _ in range(part.count):
                accountant.step(
                    noise_multiplier=part.noise_multiplier, sample_rate=part.sample_rate
                )
        expected = accountant.get_epsilon(DELTA)
        ours = epsilon_of(history, DELTA, name)  # type: ignore[arg-type]
        assert ours == pytest.approx(expected, abs=1e-12 if name == "rdp" else 0.01)


def test_where_prv_is_too_large_to_compute_epsilon_is_that_of_rdp() -> None:
    history = [noisy(0.1, 0.5, 1000)]
    assert epsilon_of(history, DELTA, "prv") == epsilon_of(history, DELTA, "rdp") > 20
    assert epsilon_of([noisy(0.0)], DELTA) == math.inf
    assert epsilon_of([], DELTA) == 0


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_noise_for_a_target_meets_it_and_little_more(accountant: str) -> None:
    noise = noise_for(3.0, DELTA, 0.1, 50, accountant)
    spent = epsilon_of([noisy(noise, 0.1, 50)], DELTA, accountant)  # type: ignore[arg-type]
    assert 2.9 < spent <= 3.0


@pytest.mark.parametrize(("n", "told"), [(0, "0 samples"), (5, "5 samples, batch_size 8")])
def test_a_client_without_a_batch_is_told_so_before_anything_is_charged(n: int, told: str) -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=8, drop_last=True, lr=0.1)
    with pytest.raises(ValueError, match=f"no batch to train on: {told}"):
        planned(DPSGD(epsilon=8.0), training, samples=n, rounds=1)


def test_the_client_chooses_noise_with_which_all_rounds_fit_exactly() -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=4, epochs=2)
    made = planned(DPSGD(epsilon=2.0), training, samples=40, rounds=10)
    one = steps_of(training, 40, noise=made.noise)
    assert one == noisy(made.noise, 0.1, 20)
    assert participations_within(2.0, DELTA, one, 12) == 10


def test_targets_that_cannot_be_met_are_refused_with_what_could_be() -> None:
    training = LocalTraining(batch_size=4)
    with pytest.raises(AccountingError, match=r"rdp certifies 0\.103 at best"):
        planned(DPSGD(epsilon=0.05, accountant="rdp"), training, samples=40, rounds=10)
    fixed = DPSGD(epsilon=1.0, noise_multiplier=1.0)
    with pytest.raises(AccountingError, match=r"they spend 4\.38, and 0 fit; 3\.\d+ or more"):
        planned(fixed, training, samples=4, rounds=10)
    loose = DPSGD(epsilon=5.0, noise_multiplier=1.0)
    assert planned(loose, training, samples=4, rounds=10) == loose
    with pytest.raises(AccountingError, match=r"for 10 participations .* and 1 fit"):
        planned(loose, training, samples=4, rounds=10, needed=10)


def test_without_opacus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(AccountingError, match=r"pip install 'fl-privacy\[dp\]'"):
        epsilon_of([noisy(1.0)], DELTA)

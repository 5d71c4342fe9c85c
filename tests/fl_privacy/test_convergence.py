"""Theorem 2: the formula by hand, its parts measured, and runs that obey it or show its limits."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import hessian
from torch.nn import functional as F

from fl_privacy.component import create
from fl_privacy.convergence import (
    Assumptions,
    bound,
    delay,
    pruning_error,
    softmax_smoothness,
    step_size,
    steps_until,
)
from fl_privacy.seeding import generator
from fl_privacy.softmax_regression import (
    Federation,
    gradients,
    losses,
    measured,
    minimum,
    moments,
    slopes,
)
from fl_privacy.types import Task

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality_convergence.py"
ASSUMED = Assumptions(
    mu=0.5,
    smoothness=2.0,
    weights=(0.5, 0.5),
    variances=(1.0, 3.0),
    gradient=10.0,
    heterogeneity=0.25,
    distance=4.0,
    pruned=2,
    column=0.5,
)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("quality_convergence", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def federation(devices: int = 4, n: int = 12, d: int = 5, classes: int = 3) -> Federation:
    """Random features with a constant 1; the largest of each sample is pruned."""
    x = torch.randn(devices, n, d, generator=generator("features"), dtype=torch.float64)
    x[..., -1] = 1
    keep = torch.ones_like(x, dtype=torch.bool)
    keep.scatter_(2, x[..., :-1].abs().argmax(2, keepdim=True), False)
    labels = torch.randint(classes, (devices, n), generator=generator("labels"))
    labels[:, 0] = torch.arange(devices) % classes
    return Federation(x, labels, keep, classes, mu=0.1)


def test_the_bound_computed_by_hand() -> None:
    """kappa 4, gamma 32; Q = (1 + 1 + 1 + 3) / 4 + 3 + 8 * 4 * 11 = 356.5; C = 4 * 9 * 11 = 396."""
    assert delay(ASSUMED, 3) == 32
    assert step_size(ASSUMED, 3, 8) == pytest.approx(0.1)
    want = 2 * 4 / (32 + 8) * ((356.5 + 396) / 0.5 + 0.5 * 32 / 2 * 4)
    assert bound(ASSUMED, local_steps=3, participants=1, steps=8) == pytest.approx(want)
    all_of_them = 2 * 4 / (32 + 8) * (356.5 / 0.5 + 32)
    assert bound(ASSUMED, local_steps=3, participants=2, steps=8) == pytest.approx(all_of_them)
    assert delay(ASSUMED, 100) == 100


def test_the_bound_reaches_a_level_after_the_steps_it_says() -> None:
    setting = {"local_steps": 3, "participants": 1}
    steps = steps_until(ASSUMED, **setting, level=0.5)
    assert bound(ASSUMED, **setting, steps=round(steps)) == pytest.approx(0.5, rel=1e-3)
    assert steps_until(ASSUMED, **setting, level=1e9) == 0


def test_without_pruning_the_bound_is_lower() -> None:
    plain = replace(ASSUMED, pruned=0)
    for e, k in ((1, 1), (1, 2), (5, 1)):
        setting = {"local_steps": e, "participants": k, "steps": 7}
        assert bound(plain, **setting) < bound(ASSUMED, **setting)


def test_constants_that_fit_no_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 < mu <= smoothness, got 0\.0.*weight decay"):
        replace(ASSUMED, mu=0.0)
    with pytest.raises(ValueError, match=r"sum to 1.*sum 0\.75"):
        replace(ASSUMED, weights=(0.5, 0.25))


def test_pruning_moves_a_gradient_by_eps_lambda_at_most() -> None:
    """Against gradients taken by autograd, with and without the pruned features."""
    data = federation()
    w = torch.randn(3, 5, generator=generator("w"), dtype=torch.float64)
    x, keep = data.features[0], data.keep[0]
    delta = slopes(data, w)[0]
    distance, limit = pruning_error(delta, x, keep)
    for i in range(len(x)):
        moved = w.clone().requires_grad_()
        logits = moved @ (x[i] * keep[i]) + (w @ x[i] - w @ (x[i] * keep[i]))
        (pruned,) = torch.autograd.grad(F.cross_entropy(logits, data.labels[0, i]), moved)
        moved = w.clone().requires_grad_()
        (plain,) = torch.autograd.grad(F.cross_entropy(moved @ x[i], data.labels[0, i]), moved)
        assert float((plain - pruned).square().sum()) == pytest.approx(float(distance[i]))
    assert bool((distance <= limit + 1e-12).all())
    torch.testing.assert_close(distance, limit)  # one pruned feature a sample: equal
    two = keep.clone()
    two[:, 0] = two[:, 1] = False
    distance, limit = pruning_error(delta, x, two)
    assert bool((distance < limit).all())


def test_the_hessian_of_softmax_regression_is_below_l() -> None:
    data = federation()
    x, labels = data.features[0], data.labels[0]

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.view(3, 5).T, labels) + 0.05 * w.square().sum()

    for size in (0.0, 1.0, 5.0):
        w = size * torch.randn(15, generator=generator("w"), dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(hessian(loss)(w))
        assert float(eigenvalues[0]) >= 0.1 - 1e-9
        assert float(eigenvalues[-1]) <= softmax_smoothness(x, 0.1)


def test_measured_gradients_variances_and_minima_are_the_true_ones() -> None:
    data = federation()
    w = torch.randn(3, 5, generator=generator("w"), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(losses(data, w)[1], w)
    torch.testing.assert_close(gradients(data, w.detach())[1], slope)
    found = moments(data, w.detach(), batch=5)
    draws = torch.stack(
        [torch.randperm(12, generator=generator("draw", i))[:5] for i in range(20000)]
    )
    of_samples = slopes(data, w.detach())[1][:, :, None] * data.features[1][:, None]
    batches = of_samples[draws].mean(1)
    spread = (batches - of_samples.mean(0)).square().sum((1, 2)).mean()
    assert float(found.variances[1]) == pytest.approx(float(spread), rel=0.03)
    best, lowest, excess = minimum(data, each=False)
    _, each, _ = minimum(data, each=True)
    assert excess < 1e-9
    assert float(gradients(data, best[0]).mean(0).norm()) < 1e-4
    assert float(each.mean()) < float(lowest) <= float(losses(data, w.detach()).mean())


@pytest.mark.parametrize("participants", [2, 6])
def test_fedavg_on_quadratics_obeys_the_bound(participants: int) -> None:
    """F_k = |w - c_k|^2 / 2, noisy gradients, three local steps: mu = L = 1, all is known."""
    devices, d, local_steps, noise = 6, 3, 3, 0.5
    centers = torch.randn(devices, d, generator=generator("centers"), dtype=torch.float64)
    best, start = centers.mean(0), torch.full((d,), 4.0, dtype=torch.float64)
    largest = float((start - centers).square().sum(1).max())
    assumed = Assumptions(
        mu=1.0,
        smoothness=1.0,
        weights=[1 / devices] * devices,
        variances=[d * noise**2] * devices,
        gradient=largest + d * noise**2,
        heterogeneity=float((centers - best).square().sum(1).mean()) / 2,
        distance=float((start - best).square().sum()),
    )
    draw = generator("noise")
    w = start.expand(200, d).clone()  # runs
    for number in range(30):
        order = torch.rand(200, devices, generator=draw).argsort(1)[:, :participants]
        local = w[:, None].expand(-1, participants, -1)
        for step in range(local_steps):
            t = number * local_steps + step
            shaken = torch.randn(local.shape, generator=draw, dtype=torch.float64)
            gradient = local - centers[order] + noise * shaken
            local = local - step_size(assumed, local_steps, t) * gradient
        w = local.mean(1)
        excess = float((w - best).square().sum(1).mean()) / 2
        limits = {"local_steps": local_steps, "participants": participants}
        assert excess <= bound(assumed, **limits, steps=(number + 1) * local_steps)
    assert excess < 0.1 * assumed.distance / 2


def options(**changed: Any) -> argparse.Namespace:
    usual = {
        "partition": "iid", "pruned": 6, "mu": 0.05, "batch_size": 4, "lr": 0.05, "seeds": 2,
        "rounds": 40, "every": 40,
    }  # fmt: skip
    return argparse.Namespace(**(usual | changed))


def test_the_script_s_step_is_local_training_with_soteria(
    script: ModuleType, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    x, y = random.random((400, 4, 4)), np.arange(400) % 3
    np.savez(tmp_path / "own.npz", x_train=x, x_test=x, y_train=y, y_test=y)
    source = create("datasets", f"npz(path={str(tmp_path / 'own.npz')!r})")
    data, held = script.federation_of(source, options())
    assert data.features.shape == (100, 4, 17) and len(held) == 100
    assert data.pruned == 6
    assert script.check_step(source, data, options()) < 1e-5
    unpruned = replace(data, keep=torch.ones_like(data.keep))
    assert script.check_step(source, unpruned, options()) > 1e-2


def test_soteria_rests_above_the_minimum_and_so_leaves_its_bound(script: ModuleType) -> None:
    """The pruned gradient is biased: it vanishes where the loss is not least."""
    data = federation()
    best, lowest, _ = minimum(data, each=False)
    rest = script.resting_point(data, best[0])
    assert rest is not None
    assert float(gradients(data, rest, pruned=True).mean(0).norm()) < 1e-3
    floor = float(losses(data, rest).mean() - lowest)
    assert floor > 1e-3
    zero = torch.zeros_like(best[0])
    gap = float(lowest - minimum(data, each=True)[1].mean())
    assumed = measured(data, [zero, best[0], rest], batch=4, best=best[0], gap=gap)
    limits = {"local_steps": 2, "participants": 2}
    later = round(steps_until(assumed, **limits, level=floor)) + 1
    assert bound(assumed, **limits, steps=later) < floor


def test_logistic_sees_the_normalized_input() -> None:
    task = Task(input_shape=(1, 2, 2), classes=3, mean=(0.5,), std=(0.5,))
    model = create("models", "logistic").build(task, seed=1)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        "classifier.weight": (3, 4), "classifier.bias": (3,),
    }  # fmt: skip
    assert all(not p.any() for p in model.parameters())
    build = create("models", "logistic(start='random')").build
    first, again, other = (build(task, seed=s).classifier.weight for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)

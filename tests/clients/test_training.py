"""Local training against closed forms and hand-written loops."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Generator, Tensor, nn

from clients.defenses.per_sample_clipping import PerSampleClipping
from clients.training import draw_batches, evaluate_model, local_train, set_mode
from fl_privacy.models.mlp import MLP
from fl_privacy.types import LocalTraining, Samples, Stats, Step, Task, Tensors

TASK = Task(input_shape=(1, 4, 4), classes=3, mean=(0.4,), std=(0.3,))


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 10) -> Samples:
    return Samples(torch.rand(n, 1, 4, 4, generator=seeded(9)), torch.arange(n) % 3)


def network() -> nn.Module:
    return MLP(hidden=(6,)).build(TASK, seed=1).double()


def double(samples: Samples) -> Samples:
    return Samples(samples.inputs.double(), samples.labels)


def gradient(model: nn.Module, samples: Samples) -> dict[str, Tensor]:
    outputs = model(TASK.normalize(samples.inputs))
    loss = nn.functional.cross_entropy(outputs, samples.labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def batch_of(indices: Sequence[Tensor]) -> Samples:
    chosen, samples = torch.cat(list(indices)), double(data())
    return Samples(samples.inputs[chosen], samples.labels[chosen])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_fedsgd_update_is_minus_lr_times_the_gradient(weight_decay: float) -> None:
    """Also under weight decay: -lr (g + lambda w); momentum changes no first step."""
    training = LocalTraining(lr=0.5, batch_size=4, weight_decay=weight_decay, momentum=0.9)
    model, seen = network(), []
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    original = deepcopy(model)
    result = local_train(
        model,
        TASK,
        double(data()),
        training,
        generator=seeded(),
        on_step=lambda step, batch, indices: seen.append(indices),
    )
    assert (len(seen), len(seen[0]), result.num_examples) == (1, 4, 4)
    for name, g in gradient(original, batch_of(seen)).items():
        expected = -0.5 * (g + weight_decay * before[name])
        torch.testing.assert_close(result.state[name] - before[name], expected, rtol=0, atol=1e-12)


def by_hand(batches: list[Tensor], training: LocalTraining) -> dict[str, Tensor]:
    """SGD with momentum as in its definition: v = mu v + g + lambda w; w = w - lr v."""
    model = network()
    velocity: dict[str, Tensor] = {}
    for indices in batches:
        for name, g in gradient(model, batch_of([indices])).items():
            parameter = model.get_parameter(name)
            g = g + training.weight_decay * parameter.detach()
            velocity[name] = training.momentum * velocity[name] + g if name in velocity else g
            parameter.data -= training.lr * velocity[name]
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedavg_equals_a_loop_written_by_hand(
    order: Literal["shuffled", "sequential"], drop_last: bool, momentum: float
) -> None:
    training = LocalTraining(
        algorithm="fedavg",
        lr=0.1,
        momentum=momentum,
        weight_decay=0.01,
        epochs=2,
        batch_size=4,
        drop_last=drop_last,
        order=order,
    )
    batches: list[Tensor] = []
    result = local_train(
        network(),
        TASK,
        double(data()),
        training,
        generator=seeded(),
        on_step=lambda step, batch, indices: batches.append(indices),
    )
    assert len(batches) == training.steps(10) == (4 if drop_last else 6)
    assert result.num_examples == 10
    for name, value in by_hand(batches, training).items():
        torch.testing.assert_close(result.state[name], value, rtol=0, atol=1e-12)


def test_each_epoch_visits_every_sample_once_in_its_own_order() -> None:
    training = LocalTraining(algorithm="fedavg", epochs=3, batch_size=4)
    batches = list(draw_batches(10, training, generator=seeded()))
    epochs = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_sequential_batches_are_in_the_order_of_the_samples() -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=4, order="sequential")
    batches = list(draw_batches(10, training, generator=seeded()))
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_fedsgd_draws_another_batch_from_another_generator() -> None:
    training = LocalTraining(batch_size=4)
    draws = [next(draw_batches(100, training, generator=seeded(i))).tolist() for i in range(5)]
    assert len({tuple(draw) for draw in draws}) == 5
    assert all(len(set(draw)) == 4 for draw in draws)


def test_fedsgd_with_little_data_takes_all_of_it() -> None:
    result = local_train(
        network(), TASK, double(data(3)), LocalTraining(batch_size=8), generator=seeded()
    )
    assert result.num_examples == 3


def test_poisson_batches_have_the_nominal_size_on_average() -> None:
    """Sizes are binomial(50, 8/50): the mean over 4,000 batches within five standard errors."""
    training = LocalTraining(algorithm="fedavg", batch_size=8, epochs=572)
    batches = list(draw_batches(50, training, sampling="poisson", generator=seeded()))
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    assert len(sizes) == training.steps(50)
    error = (50 * 0.16 * 0.84 / len(sizes)) ** 0.5
    assert abs(float(sizes.mean()) - 8) < 5 * error
    assert float(sizes.var()) == pytest.approx(50 * 0.16 * 0.84, rel=0.1)


@pytest.mark.parametrize(("n", "drop_last"), [(0, False), (3, True)])
def test_no_batch_is_an_error_that_says_why(n: int, drop_last: bool) -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=4, drop_last=drop_last)
    with pytest.raises(ValueError, match=rf"{n} samples, batch_size 4, drop_last {drop_last}"):
        local_train(network(), TASK, double(data(n)), training, generator=seeded())


def test_the_hook_sees_pixels_and_the_loss_is_the_mean_before_the_steps() -> None:
    model, samples, seen = network(), double(data()), []
    start = deepcopy(model)
    result = local_train(
        model,
        TASK,
        samples,
        LocalTraining(batch_size=10, lr=10.0),
        generator=seeded(),
        on_step=lambda step, batch, indices: seen.append((step, batch, indices)),
    )
    step, batch, indices = seen[0]
    assert step == 0
    assert torch.equal(batch.inputs, samples.inputs[indices])
    assert torch.equal(batch.labels, samples.labels[indices])
    loss, _ = evaluate_model(start, TASK, samples)
    assert result.loss == pytest.approx(loss, rel=1e-12)


def with_dropout_and_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )


def test_training_is_repeatable_and_leaves_global_randomness_alone() -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=4, epochs=2, lr=0.1)
    model = with_dropout_and_norm()
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        result = local_train(deepcopy(model), TASK, data(), training, generator=seeded(5))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(result.state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_moves_its_statistics_in_train_mode_only(mode: Literal["train", "eval"]) -> None:
    model = with_dropout_and_norm()
    training = LocalTraining(batch_size=8, batch_norm=mode)
    set_mode(model, training)
    norm, dropout = model.get_submodule("1"), model.get_submodule("3")
    assert (norm.training, dropout.training) == (mode == "train", True)
    before = norm.get_buffer("running_mean").clone()
    local_train(model, TASK, data(), training, generator=seeded())
    assert torch.equal(norm.get_buffer("running_mean"), before) == (mode == "eval")


class Doubling:
    """A gradient defense for tests: twice the plain mean gradient, and the seed it drew."""

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "shuffle"

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        parameters = {k: v.clone().requires_grad_() for k, v in step.parameters.items()}
        state: dict[str, Any] = {**parameters, **step.buffers}
        outputs = torch.func.functional_call(step.model, state, (step.inputs,))
        loss = step.loss(outputs, step.labels).sum() / step.expected_batch_size
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        doubled = {k: 2 * g for k, g in zip(parameters, gradients, strict=True)}
        return doubled, {"draw": torch.rand((), generator=generator)}


def test_a_gradient_defense_replaces_the_gradient_of_every_step() -> None:
    """Doubling the gradient is doubling the learning rate; weight decay stays outside."""
    settings = {"algorithm": "fedavg", "batch_size": 4, "epochs": 2}
    defended = local_train(
        network(),
        TASK,
        double(data()),
        LocalTraining(lr=0.1, **settings),
        generator=seeded(),
        gradient_defense=Doubling(),
        defense_generator=seeded(3),
    )
    plain = local_train(
        network(), TASK, double(data()), LocalTraining(lr=0.2, **settings), generator=seeded()
    )
    for name, value in plain.state.items():
        torch.testing.assert_close(defended.state[name], value, rtol=0, atol=1e-12)
    assert defended.loss == pytest.approx(plain.loss, rel=1e-12)
    draws = torch.stack([torch.rand((), generator=g) for g in [seeded(3)] for _ in range(6)])
    assert defended.stats == {"draw": pytest.approx(float(draws.mean()))}


def test_a_defense_leaves_batch_norm_statistics_as_plain_training_does() -> None:
    training = LocalTraining(batch_size=8)
    plain, defended = with_dropout_and_norm(), with_dropout_and_norm()
    local_train(plain, TASK, data(), training, generator=seeded())
    local_train(
        defended,
        TASK,
        data(),
        training,
        generator=seeded(),
        gradient_defense=Doubling(),
        defense_generator=seeded(),
    )
    for name, value in plain.named_buffers():
        assert torch.equal(value, defended.get_buffer(name))


def test_a_frozen_layer_stays_as_it_is_under_a_gradient_defense() -> None:
    model = network()
    first, *others = model.parameters()
    first.requires_grad_(False)
    before = [value.detach().clone() for value in (first, *others)]
    local_train(
        model,
        TASK,
        double(data()),
        LocalTraining(algorithm="fedsgd", lr=0.1, batch_size=4),
        generator=seeded(),
        gradient_defense=PerSampleClipping(max_norm=1.0),
        defense_generator=seeded(1),
    )
    assert torch.equal(first, before[0])
    assert not torch.equal(others[-1], before[-1])


def test_clipping_does_not_count_what_a_frozen_layer_would_get() -> None:
    model = network()
    first, *others = model.parameters()
    first.requires_grad_(False)
    start = [value.detach().clone() for value in others]
    local_train(
        model,
        TASK,
        Samples(data().inputs[:1].double(), data().labels[:1]),
        LocalTraining(algorithm="fedsgd", lr=1.0, batch_size=1),
        generator=seeded(),
        gradient_defense=PerSampleClipping(max_norm=1e-3),
        defense_generator=seeded(1),
    )
    step = torch.cat([(a.detach() - b).flatten() for a, b in zip(others, start, strict=True)])
    assert step.norm() == pytest.approx(1e-3)


def test_a_gradient_defense_without_its_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="defense_generator"):
        local_train(
            network(),
            TASK,
            double(data()),
            LocalTraining(),
            generator=seeded(),
            gradient_defense=PerSampleClipping(max_norm=1.0),
        )


def test_evaluation_is_the_mean_over_all_samples_and_needs_some() -> None:
    model, samples = network(), double(data())
    outputs = model(TASK.normalize(samples.inputs))
    loss, accuracy = evaluate_model(model, TASK, samples, batch_size=3)
    expected = nn.functional.cross_entropy(outputs, samples.labels)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert accuracy == pytest.approx(float((outputs.argmax(1) == samples.labels).double().mean()))
    with pytest.raises(ValueError, match="no samples"):
        evaluate_model(model, TASK, double(data(0)))

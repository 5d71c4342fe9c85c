"""Sensitivity to the label side: against double backward, where it degenerates, what is refused."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.layerwise.sensitivity_label import LabelSensitivity, Norm, entrywise, jacobian
from adversaries.layerwise.sensitivity_table import networks
from fl_privacy.layers import LayerMetricError, weight_layers, weight_of
from fl_privacy.seeding import generator
from fl_privacy.testing import check_layer_metric
from fl_privacy.types import Exchange, LayerScores, Observation, Samples, Task

CPU = torch.device("cpu")
NORMS: tuple[Norm, ...] = ("F", "1", "inf")
IMAGES = Task(input_shape=(2, 6, 6), classes=3, mean=(0.4, 0.6), std=(0.3, 0.2))
TWO = IMAGES.model_copy(update={"classes": 2})


def dense(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, classes, bias=False)
    )


def rectified(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, classes))


def convolutions(classes: int = 3) -> nn.Module:
    """Stride, dilation, groups, no padding, activations that work in place, batch norm."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (2, 1), groups=2, padding=(1, 0), bias=False),
        nn.BatchNorm2d(4),
        nn.Sigmoid(),
        nn.Conv2d(4, 2, 2, dilation=2),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


class Odd(nn.Module):
    """Layers that are no plain product: padding by name, run twice, shared, used by function."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, 2, 3, padding="same")
        self.rows = nn.Linear(6, 3)
        self.twice = nn.Linear(3, 3)
        self.shared = nn.Linear(3, 3)
        self.sharing = nn.Linear(3, 3)
        self.sharing.weight = self.shared.weight
        self.used = nn.Linear(36, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(inputs))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(self.rows(hidden)))))
        hidden = self.sharing(torch.tanh(self.shared(hidden))).flatten(1)
        outputs: Tensor = self.used(hidden) + F.linear(hidden.square(), self.used.weight)
        return outputs


Make = Callable[..., nn.Module]


def made(make: Make, classes: int = 3) -> nn.Module:
    """A network in float64 whose weights are its own seed's; batch norm has seen something."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model = make(classes).double()
        with torch.no_grad():
            model(torch.randn(16, 2, 6, 6, dtype=torch.float64))
    return model.eval()


def observed(*models: nn.Module, task: Task = IMAGES) -> list[Observation]:
    """One observation for each of these global models."""

    def sent(number: int, model: nn.Module) -> Exchange:
        parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return Exchange(1, number, "0", 1, f"r{number}", f"g{number}", parameters, buffers, {}, {})

    first = deepcopy(models[0])
    return [Observation(str(i), (sent(i, m),), lambda: first, task) for i, m in enumerate(models)]


def samples(n: int = 5, task: Task = IMAGES) -> Samples:
    inputs = torch.rand(n, *task.input_shape, generator=generator(0, "inputs"))
    return Samples(inputs.double(), torch.arange(n) % task.classes)


def jacobians(
    model: nn.Module, layer: str, x: Tensor, label: Tensor, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, and its Jacobians to the soft label and to the logits, by double backward."""
    weight = model.get_parameter(weight_of(layer)).requires_grad_()
    logits = model(task.normalize(x)[None])[0]

    def gradient(y: Tensor) -> Tensor:
        loss = -(y * logits.log_softmax(0)).sum()
        (found,) = torch.autograd.grad(loss, weight, create_graph=True)
        return found.flatten()

    one_hot = F.one_hot(label, task.classes).double()
    slopes = torch.stack([torch.autograd.grad(z, weight, retain_graph=True)[0] for z in logits])
    of_logits = jacobian_of(lambda z: slopes.flatten(1).T @ (z.softmax(0) - one_hot), logits)
    return gradient(one_hot).detach(), jacobian_of(gradient, one_hot), of_logits


def jacobian_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(function, at.detach())  # type: ignore[no-untyped-call]
    return found


def norm_of(matrix: Tensor, norm: Norm) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(matrix, ord=2 if norm == "F" else float(norm))
    return found


def measured(
    metric: LabelSensitivity, data: Samples, *models: nn.Module, task: Task = IMAGES
) -> LayerScores:
    return metric.measure(observed(*models, task=task), data, seed=0, device=CPU)


NAMES = (
    "to logits",
    "eq. (2) to the letter",
    "norm alone, to logits",
    "norm alone, to label",
    "RMS over range of the gradient",
)


@pytest.mark.parametrize("make", [dense, convolutions, Odd])
def test_every_layer_and_norm_equals_double_backward(make: Make) -> None:
    model, data = made(make), samples()
    layers = weight_layers(model, IMAGES)
    pairs = list(zip(data.inputs, data.labels, strict=True))
    found = {layer: [jacobians(model, layer, *pair, IMAGES) for pair in pairs] for layer in layers}
    for norm in NORMS:
        scores = measured(LabelSensitivity(norm=norm), data, model)
        assert scores.layers == layers
        for i, layer in enumerate(layers):
            wanted = torch.stack([wanted_values(*one, norm) for one in found[layer]])
            for name, values in zip(NAMES, wanted.T, strict=True):
                torch.testing.assert_close(scores.columns[f"{name}, mean"][i], values.mean())
                torch.testing.assert_close(scores.columns[f"{name}, median"][i], values.median())
            assert scores.standard_errors is not None
            torch.testing.assert_close(scores.values[i], wanted[:, 0].mean())
            torch.testing.assert_close(scores.standard_errors[i], wanted[:, 0].std() / 5**0.5)


def wanted_values(gradient: Tensor, of_label: Tensor, of_logits: Tensor, norm: Norm) -> Tensor:
    """One sample's values, in the order of `NAMES`."""
    count, span = gradient.numel(), gradient.max() - gradient.min()
    psi = {"F": count**0.5, "1": count, "inf": 1}[norm]
    norms = torch.stack([norm_of(matrix, norm) for matrix in (of_logits, of_label)])
    return torch.cat([norms / psi / span, norms, gradient.norm()[None] / count**0.5 / span])


def test_layers_that_are_no_plain_product_are_found_out() -> None:
    (odd,) = networks(observed(made(Odd)), (), CPU)
    assert odd.whole == ("wide", "twice", "shared", "used")
    assert odd.factored == ("rows",)
    (plain,) = networks(observed(made(convolutions)), (), CPU)
    assert plain.whole == ()


def test_the_jacobian_to_the_label_has_rank_below_the_classes_and_gives_the_gradient() -> None:
    model, data = made(convolutions), samples(1)
    gradient, of_label, of_logits = jacobians(model, "0", data.inputs[0], data.labels[0], IMAGES)
    logits = model(IMAGES.normalize(data.inputs))[0]
    p = logits.softmax(0).detach()
    torch.testing.assert_close(of_label[:, data.labels[0]], gradient)
    torch.testing.assert_close(of_label @ p, torch.zeros_like(gradient))
    torch.testing.assert_close(of_logits, -of_label * p)
    (network,) = networks(observed(model), (), CPU)
    found, columns = jacobian(network, data.inputs)
    torch.testing.assert_close(found[0], p)
    assert int(torch.linalg.matrix_rank(of_label)) == IMAGES.classes - 1
    squares = of_label.square().sum(0)
    torch.testing.assert_close(columns.squares[0, :, 0], squares)
    torch.testing.assert_close(
        entrywise(columns, torch.ones_like(found), "F")[0, 0], of_label.norm()
    )


@pytest.mark.parametrize("make", [dense, convolutions])
def test_with_two_classes_only_the_ratio_of_rms_to_range_depends_on_the_layer(make: Make) -> None:
    model, data = made(make, 2), samples(1, TWO)
    scores = measured(LabelSensitivity(of="label"), data, model, task=TWO)
    logits_scores = measured(LabelSensitivity(), data, model, task=TWO)
    p = model(TWO.normalize(data.inputs)).softmax(1)[0, data.labels[0]].detach()
    ratio = scores.columns["RMS over range of the gradient, mean"]
    torch.testing.assert_close(scores.values, (1 + (p / (1 - p)) ** 2).sqrt() * ratio)
    torch.testing.assert_close(logits_scores.values, 2**0.5 * p * ratio)


def test_with_two_classes_eq_2_grows_without_bound_and_keeps_its_digits_in_single_precision() -> (
    None
):
    model, data = made(dense, 2), samples(1, TWO)
    kept = model.get_parameter("3.weight").detach().clone()
    values, ratios = [], []
    for scale in (1, 10, 40):
        with torch.no_grad():
            model.get_parameter("3.weight").copy_(kept * scale)
            p = model(TWO.normalize(data.inputs)).softmax(1)
        label = p.argmax(1)
        certain = Samples(data.inputs, label)
        scores = measured(LabelSensitivity(of="label"), certain, model, task=TWO)
        model.float()
        single = measured(LabelSensitivity(of="label"), certain, model, task=TWO)
        model.double()
        torch.testing.assert_close(single.values, scores.values, rtol=1e-3, atol=0)
        values.append(float(scores.values[0]))
        ratios.append(float(p.max() / p.min()))
    assert values[0] < values[1] < values[2]
    assert values[2] / values[0] == pytest.approx(ratios[2] / ratios[0], rel=0.5)


def test_samples_without_a_gradient_are_dropped_where_it_is_missing_and_counted() -> None:
    model, data = made(rectified), samples(4)
    first = model.get_submodule("1")
    with torch.no_grad():
        seen = IMAGES.normalize(data.inputs).flatten(1)
        shift = first(seen)[0].max() + 1e-3
        model.get_parameter("1.bias").sub_(shift)  # the first sample activates nothing
        others = first(seen).amax(1) > 0
    assert not others[0]
    assert others.any()
    scores = measured(LabelSensitivity(), data, model)
    used = scores.columns["samples used"]
    assert used.tolist() == [float(others.sum())] * 2
    assert scores.columns["samples dropped"].tolist() == [float((~others).sum())] * 2
    kept = Samples(data.inputs[others], data.labels[others])
    torch.testing.assert_close(measured(LabelSensitivity(), kept, model).values, scores.values)
    nothing = measured(LabelSensitivity(least_range=1e6), data, model)
    assert nothing.values.isnan().all()
    assert nothing.columns["samples used"].tolist() == [0, 0]


@pytest.mark.parametrize("make", [convolutions, Odd])
def test_chunks_change_nothing(make: Make) -> None:
    model, data = made(make), samples(5)
    whole = measured(LabelSensitivity(chunk=8), data, model)
    parts = measured(LabelSensitivity(chunk=2), data, model)
    torch.testing.assert_close(whole.values, parts.values)
    assert whole.n == parts.n == 5


def test_of_several_global_models_a_sample_has_its_mean_and_the_spread_is_told() -> None:
    one, data = made(convolutions), samples()
    other = made(convolutions)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    alone = [measured(LabelSensitivity(), data, model).values for model in (one, other)]
    both = measured(LabelSensitivity(), data, one, other)
    torch.testing.assert_close(both.values, torch.stack(alone).mean(0))
    torch.testing.assert_close(both.columns["deviation over 2 models"], torch.stack(alone).std(0))
    same = observed(one) * 3
    repeated = LabelSensitivity().measure(same, data, seed=0, device=CPU)
    torch.testing.assert_close(repeated.values, alone[0])


def test_it_keeps_the_contract_of_layer_metrics() -> None:
    check_layer_metric(LabelSensitivity())
    check_layer_metric(LabelSensitivity(of="label", norm="inf", chunk=3))


def test_what_cannot_be_measured_is_refused_with_the_remedy() -> None:
    model, data = made(dense), samples()
    here = observed(model)
    mixing = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), dense()).double()
    refused: list[tuple[list[Observation], Samples | None, str]] = [
        (here, None, "one sample, got none"),
        ([], data, "one observation, got none"),
        (here, replace(data, inputs=data.inputs[:, :1]), "of the recorded task"),
        (here, replace(data, labels=data.labels + 1), "labels 0 to 2, got 1 to 3"),
        (observed(nn.Flatten()), data, "no layer"),
        (observed(mixing), data, "depends on the others of its batch"),
    ]
    for observations, given, reason in refused:
        with pytest.raises(LayerMetricError, match=reason):
            LabelSensitivity().measure(observations, given, seed=0, device=CPU)
    with pytest.raises(LayerMetricError, match="did you mean '3'"):
        LabelSensitivity(layers=("33",)).measure(here, data, seed=0, device=CPU)

"""Sensitivity to the label side: against double backward, where it degenerates, what is refused."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.layerwise.gradient_sizes import Norm
from adversaries.layerwise.sensitivity_label import LabelSensitivity, jacobians
from adversaries.layerwise.sensitivity_table import networks
from fl_privacy.layers import LayerMetricError, weight_layers, weight_of
from fl_privacy.testing import check_layer_metric
from fl_privacy.types import LayerScores, Observation, Samples, Task

CPU = torch.device("cpu")
NORMS: tuple[Norm, ...] = ("F", "1", "inf")

Make = Callable[..., nn.Module]
Observe = Callable[..., list[Observation]]
Draw = Callable[..., Samples]
Silenced = tuple[nn.Module, Samples, Tensor]


def wanted_jacobians(
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
    metric: LabelSensitivity, observations: Sequence[Observation], data: Samples | None
) -> LayerScores:
    return metric.measure(observations, data, seed=0, device=CPU)


NAMES = (
    "to logits",
    "eq. (2) to the letter",
    "norm alone, to logits",
    "norm alone, to label",
    "RMS over range of the gradient",
)


@pytest.mark.parametrize("kind", ["dense", "convolutions", "odd"])
def test_every_layer_and_norm_equals_double_backward(
    kind: str, made: Make, observed: Observe, samples: Draw, task: Task
) -> None:
    model, data = made(kind), samples()
    layers = weight_layers(model, task)
    pairs = list(zip(data.inputs, data.labels, strict=True))
    found = {
        layer: [wanted_jacobians(model, layer, *pair, task) for pair in pairs] for layer in layers
    }
    for norm in NORMS:
        scores = measured(LabelSensitivity(norm=norm), observed(model), data)
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


def test_layers_that_are_no_plain_product_are_found_out(made: Make, observed: Observe) -> None:
    (odd,) = networks(observed(made("odd")), (), CPU)
    assert odd.whole == ("wide", "twice", "shared", "used")
    assert odd.factored == ("rows",)
    (plain,) = networks(observed(made("convolutions")), (), CPU)
    assert plain.whole == ()


def test_the_jacobian_to_the_label_has_rank_below_the_classes_and_gives_the_gradient(
    made: Make, observed: Observe, samples: Draw, task: Task
) -> None:
    model, data = made("convolutions"), samples(1)
    gradient, of_label, of_logits = wanted_jacobians(
        model, "0", data.inputs[0], data.labels[0], task
    )
    p = model(task.normalize(data.inputs))[0].softmax(0).detach()
    torch.testing.assert_close(of_label[:, data.labels[0]], gradient)
    torch.testing.assert_close(of_label @ p, torch.zeros_like(gradient))
    torch.testing.assert_close(of_logits, -of_label * p)
    assert int(torch.linalg.matrix_rank(of_label)) == task.classes - 1
    (network,) = networks(observed(model), (), CPU)
    found = jacobians(network, data.inputs, data.labels, "F")
    torch.testing.assert_close(found.probabilities[0], p)
    torch.testing.assert_close(found.sizes[0, :, 0], of_label.square().sum(0))
    torch.testing.assert_close(found.spans[0, 0], gradient.max() - gradient.min())


@pytest.mark.parametrize("kind", ["dense", "convolutions"])
def test_with_two_classes_only_the_ratio_of_rms_to_range_depends_on_the_layer(
    kind: str, made: Make, observed: Observe, samples: Draw, task: Task
) -> None:
    two = task.model_copy(update={"classes": 2})
    model, data = made(kind, 2), samples(1, two)
    literal = measured(LabelSensitivity(of="label"), observed(model, task=two), data)
    logits = measured(LabelSensitivity(), observed(model, task=two), data)
    p = model(two.normalize(data.inputs)).softmax(1)[0, data.labels[0]].detach()
    ratio = literal.columns["RMS over range of the gradient, mean"]
    torch.testing.assert_close(literal.values, (1 + (p / (1 - p)) ** 2).sqrt() * ratio)
    torch.testing.assert_close(logits.values, 2**0.5 * p * ratio)


def test_with_two_classes_eq_2_grows_without_bound_and_single_precision_follows(
    made: Make, observed: Observe, samples: Draw, task: Task
) -> None:
    two = task.model_copy(update={"classes": 2})
    model, data = made("dense", 2), samples(1, two)
    last = model.get_parameter("3.weight")
    kept = last.detach().clone()
    for certainty in (1, 5, 10, 20):
        with torch.no_grad():
            margin = kept @ model[:3](two.normalize(data.inputs))[0]  # type: ignore[index]
            last.copy_(kept * certainty / margin.diff().abs())
        certain = replace(data, labels=margin.argmax()[None])
        literal = measured(LabelSensitivity(of="label"), observed(model, task=two), certain)
        single = measured(
            LabelSensitivity(of="label"), observed(deepcopy(model).float(), task=two), certain
        )
        ratio = literal.columns["RMS over range of the gradient, mean"]
        odds = torch.tensor(float(certainty), dtype=torch.float64).exp()
        torch.testing.assert_close(literal.values, (1 + odds**2).sqrt() * ratio)
        torch.testing.assert_close(single.values, literal.values, rtol=1e-4, atol=0)


def test_samples_without_a_gradient_are_dropped_where_it_is_missing_and_counted(
    observed: Observe, silenced: Silenced
) -> None:
    model, data, others = silenced
    scores = measured(LabelSensitivity(), observed(model), data)
    assert scores.columns["samples used"].tolist() == [float(others.sum())] * 2
    assert scores.columns["samples dropped"].tolist() == [float((~others).sum())] * 2
    kept = Samples(data.inputs[others], data.labels[others])
    alone = measured(LabelSensitivity(), observed(model), kept)
    torch.testing.assert_close(alone.values, scores.values)
    nothing = measured(LabelSensitivity(least_range=1e6), observed(model), data)
    assert nothing.values.isnan().all()
    assert nothing.columns["samples used"].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["convolutions", "odd"])
def test_chunks_change_nothing(kind: str, made: Make, observed: Observe, samples: Draw) -> None:
    observations, data = observed(made(kind)), samples(5)
    whole = measured(LabelSensitivity(chunk=8), observations, data)
    parts = measured(LabelSensitivity(chunk=2), observations, data)
    torch.testing.assert_close(whole.values, parts.values)
    assert whole.n == parts.n == 5


def test_of_several_global_models_a_sample_has_its_mean_and_the_spread_is_told(
    made: Make, observed: Observe, samples: Draw
) -> None:
    one, other, data = made("convolutions"), made("convolutions"), samples()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    alone = [measured(LabelSensitivity(), observed(model), data).values for model in (one, other)]
    both = measured(LabelSensitivity(), observed(one, other), data)
    torch.testing.assert_close(both.values, torch.stack(alone).mean(0))
    deviation = both.columns["deviation over 2 models"]
    torch.testing.assert_close(deviation, torch.stack(alone).std(0))
    repeated = measured(LabelSensitivity(), observed(one) * 3, data)
    torch.testing.assert_close(repeated.values, alone[0])


def test_it_keeps_the_contract_of_layer_metrics() -> None:
    check_layer_metric(LabelSensitivity())
    check_layer_metric(LabelSensitivity(of="label", norm="inf", chunk=3))


def test_what_cannot_be_measured_is_refused_with_the_remedy(
    made: Make, observed: Observe, samples: Draw
) -> None:
    here, data = observed(made("dense")), samples()
    mixing = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), made("dense"))
    refused: list[tuple[list[Observation], Samples | None, str]] = [
        (here, None, "one sample, got none"),
        ([], data, "one observation, got none"),
        (here, replace(data, inputs=data.inputs[:, :1]), "of the recorded task"),
        (here, replace(data, labels=data.labels + 1), "labels 0 to 2, got 1 to 3"),
        (observed(nn.Flatten()), data, "no layer"),
        (observed(mixing.double()), data, "depends on the others of its batch"),
    ]
    for observations, given, reason in refused:
        with pytest.raises(LayerMetricError, match=reason):
            measured(LabelSensitivity(), observations, given)
    with pytest.raises(LayerMetricError, match="did you mean '3'"):
        measured(LabelSensitivity(layers=("33",)), here, data)

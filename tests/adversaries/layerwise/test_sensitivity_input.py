"""Sensitivity to the input: exact norms against double backward, probes against exact norms."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.layerwise.gradient_sizes import Norm
from adversaries.layerwise.input_changes import exact_norms, linearized, probed_norms
from adversaries.layerwise.sensitivity_input import InputSensitivity
from adversaries.layerwise.sensitivity_table import networks
from fl_privacy.component import ComponentError, create
from fl_privacy.layers import LayerMetricError, weight_layers, weight_of
from fl_privacy.seeding import generator
from fl_privacy.testing import check_layer_metric
from fl_privacy.types import LayerScores, Observation, Samples, Task

CPU = torch.device("cpu")
NORMS: tuple[Norm, ...] = ("F", "1", "inf")

Make = Callable[..., nn.Module]
Observe = Callable[..., list[Observation]]
Draw = Callable[..., Samples]
Silenced = tuple[nn.Module, Samples, Tensor]


def measured(
    metric: InputSensitivity, observations: Sequence[Observation], data: Samples, seed: int = 0
) -> LayerScores:
    return metric.measure(observations, data, seed=seed, device=CPU)


def double_backward(
    model: nn.Module, layer: str, x: Tensor, label: Tensor, task: Task
) -> tuple[Tensor, Tensor]:
    """Gradient of a sample's loss to a layer's weight, and its Jacobian to the pixels."""
    weight = model.get_parameter(weight_of(layer)).requires_grad_()

    def gradient(x: Tensor) -> Tensor:
        loss = F.cross_entropy(model(task.normalize(x)[None]), label[None])
        (found,) = torch.autograd.grad(loss, weight, create_graph=True)
        return found.flatten()

    found: Tensor = torch.autograd.functional.jacobian(gradient, x)  # type: ignore[no-untyped-call]
    return gradient(x).detach(), found


@pytest.mark.parametrize("kind", ["dense", "convolutions", "odd"])
def test_every_layer_and_norm_equals_double_backward(
    kind: str, made: Make, observed: Observe, samples: Draw, task: Task
) -> None:
    model, data = made(kind), samples(3)
    layers = weight_layers(model, task)
    pairs = list(zip(data.inputs, data.labels, strict=True))
    found = {
        layer: [double_backward(model, layer, *pair, task) for pair in pairs] for layer in layers
    }
    for norm in NORMS[:1] if kind == "odd" else NORMS:
        scores = measured(InputSensitivity(exact=True, norm=norm), observed(model), data)
        assert scores.layers == layers
        for i, layer in enumerate(layers):
            each = torch.stack([wanted(*one, norm) for one in found[layer]])
            for name, values in zip(("to the input", "norm alone"), each.T, strict=True):
                torch.testing.assert_close(scores.columns[f"{name}, mean"][i], values.mean())
                torch.testing.assert_close(scores.columns[f"{name}, median"][i], values.median())
            assert scores.standard_errors is not None
            torch.testing.assert_close(scores.values[i], each[:, 0].mean())
            torch.testing.assert_close(scores.standard_errors[i], each[:, 0].std() / 3**0.5)
            assert scores.columns["standard error over probes"][i] == 0


def wanted(gradient: Tensor, jacobian: Tensor, norm: Norm) -> Tensor:
    """The normalized norm and the norm alone."""
    entries, span = jacobian.numel(), gradient.max() - gradient.min()
    size = torch.linalg.vector_norm(jacobian, ord=2 if norm == "F" else float(norm))
    psi = {"F": entries**0.5, "1": entries, "inf": 1}[norm]
    return torch.stack([size / psi / span, size])


@pytest.mark.parametrize("kind", ["dense", "convolutions"])
def test_what_a_probe_gives_is_the_change_as_if_it_were_formed(
    kind: str, made: Make, observed: Observe, samples: Draw
) -> None:
    (network,) = networks(observed(made(kind)), (), CPU)
    data = samples(3)
    local = linearized(network, data.inputs, data.labels)
    along = torch.randn(data.inputs.shape, generator=generator(0, "along"), dtype=torch.float64)
    torch.testing.assert_close(local.squares(along), local.sizes(along, "F"))


@pytest.mark.parametrize(("kind", "seeds"), [("dense", 16), ("convolutions", 16), ("odd", 1)])
def test_probes_agree_with_the_exact_norm_within_the_error_they_report(
    kind: str, seeds: int, made: Make, observed: Observe, samples: Draw
) -> None:
    (network,) = networks(observed(made(kind)), (), CPU)
    data = samples(4 if seeds > 1 else 2)
    local = linearized(network, data.inputs, data.labels)
    exact = exact_norms(local, "F")
    found = [probed_norms(local, 64, range(len(data)), seed) for seed in range(seeds)]
    deviation = torch.stack([(norms - exact) / errors for norms, errors in found])
    assert (torch.stack([errors for _, errors in found]) < 0.2 * exact).all()
    assert deviation.abs().max() < 5
    assert 0.5 < deviation.square().mean().sqrt() < 1.5
    assert deviation.mean().abs() < 0.6


def test_the_error_over_probes_is_that_of_the_mean(
    made: Make, observed: Observe, samples: Draw
) -> None:
    observations, data = observed(made("convolutions")), samples(6)
    exact = measured(InputSensitivity(exact=True), observations, data)
    found = [measured(InputSensitivity(probes=32), observations, data, seed) for seed in range(10)]
    told = torch.stack([one.columns["standard error over probes"] for one in found]).mean(0)
    real = torch.stack([one.values - exact.values for one in found]).square().mean(0).sqrt()
    assert (real < 2 * told).all()
    assert (real > told / 2).all()


def test_a_sample_has_the_probes_of_its_number_whatever_the_chunk(
    made: Make, observed: Observe, samples: Draw
) -> None:
    observations, data = observed(made("convolutions")), samples(5)
    whole = measured(InputSensitivity(probes=3, chunk=8), observations, data)
    parts = measured(InputSensitivity(probes=3, chunk=2), observations, data)
    torch.testing.assert_close(whole.values, parts.values)
    other = measured(InputSensitivity(probes=3), observations, data, seed=1)
    assert not torch.allclose(whole.values, other.values)


def test_pixels_are_those_of_the_task_and_not_what_the_network_sees(
    made: Make, observed: Observe, samples: Draw, task: Task
) -> None:
    model, data = made("convolutions"), samples(3)
    doubled = task.model_copy(update={"mean": (0.8, 1.2), "std": (0.6, 0.4), "high": 2.0})
    larger = replace(data, inputs=2 * data.inputs)
    plain = measured(InputSensitivity(exact=True), observed(model), data)
    scaled = measured(InputSensitivity(exact=True), observed(model, task=doubled), larger)
    torch.testing.assert_close(scaled.values, plain.values / 2)


def test_samples_without_a_gradient_are_dropped_and_counted(
    observed: Observe, silenced: Silenced
) -> None:
    model, data, others = silenced
    scores = measured(InputSensitivity(probes=8), observed(model), data)
    assert 0 < float(others.sum()) < 4
    assert scores.columns["samples used"].tolist() == [float(others.sum())] * 2
    assert scores.values.isfinite().all()
    assert scores.columns["standard error over probes"].isfinite().all()


def test_it_keeps_the_contract_of_layer_metrics() -> None:
    check_layer_metric(InputSensitivity(probes=4))
    check_layer_metric(InputSensitivity(exact=True, norm="1"))


def test_what_cannot_be_measured_is_refused_with_the_remedy(
    made: Make, observed: Observe, samples: Draw, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ComponentError, match="set exact=True"):
        create("layer_metrics", "input_sensitivity(norm='inf')")
    observations, data = observed(made("dense")), samples(2)
    monkeypatch.setattr("adversaries.layerwise.sensitivity_input.ENTRIES", 72 * 360 - 1)
    with pytest.raises(LayerMetricError, match="layer '1' has 25,920 entries"):
        measured(InputSensitivity(exact=True), observations, data)
    measured(InputSensitivity(exact=True, layers=("3",)), observations, data)
    measured(InputSensitivity(probes=2), observations, data)

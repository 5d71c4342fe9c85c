"""Gradients of batches as the clients compute them, at global models that can be measured."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from adversaries.layerwise.batch_gradients import chosen_layers, gradients_of
from clients.training import local_train
from fl_privacy import component
from fl_privacy.layers import LayerMetricError
from fl_privacy.seeding import generator
from fl_privacy.testing.toys import TASK, TRAINING, toy_model, toy_observations, toy_samples
from fl_privacy.types import LocalTraining, Observation

CPU = torch.device("cpu")


def observed(model: nn.Module, training: LocalTraining = TRAINING) -> Observation:
    """An observation at ``model`` as it is."""
    first = toy_observations(1)[0][0]
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    floats = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    sent = replace(first.exchanges[0], parameters=state, buffers=floats)
    return replace(first, exchanges=(sent,), model=lambda: model, local_training=training)


def normed() -> nn.Module:
    """Batch norm whose running statistics are far from those of any batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        nn.init.constant_(norm.running_mean, 0.3)  # type: ignore[arg-type]
        nn.init.constant_(norm.running_var, 4.0)  # type: ignore[arg-type]
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
        )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_is_in_the_clients_mode(mode: Literal["train", "eval"]) -> None:
    training = LocalTraining(lr=0.1, batch_size=8, batch_norm=mode)
    samples, before = toy_samples(8), normed().state_dict()
    made = gradients_of(
        [observed(normed(), training)], ("0", "4"), samples, [torch.arange(8)], [0],
        device=CPU, seed=0,
    )  # fmt: skip
    ((_, found),) = made
    after = local_train(normed(), TASK, samples, training, generator=generator(0)).state
    for layer in ("0", "4"):
        sent = (before[f"{layer}.weight"] - after[f"{layer}.weight"]) / training.lr
        torch.testing.assert_close(found[layer], sent, rtol=1e-3, atol=1e-5)


def test_a_frozen_weight_is_no_layer_as_an_update_tells_nothing_of_it() -> None:
    model = toy_model()
    assert isinstance(model, nn.Sequential)
    model[1].weight.requires_grad_(False)
    assert chosen_layers(observed(model), ()) == ("3",)
    with pytest.raises(LayerMetricError, match="no layer '1' that is trained; layers: 3"):
        chosen_layers(observed(model), ("1",))
    with pytest.raises(LayerMetricError, match=r"no layer with a weight .* that is trained"):
        chosen_layers(observed(model.requires_grad_(False)), ())


@pytest.mark.parametrize("spec", sorted(component.installed("layer_metrics")))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_diverged_is_named(spec: str, value: float) -> None:
    model = toy_model()
    with torch.no_grad():
        next(model.parameters())[0] = value
    samples = replace(toy_samples(16), properties={"property": torch.arange(16) % 2})
    settings: dict[str, Tensor | float] = {"sigma": 0.1} if spec == "fisher_leakage" else {}
    metric = component.create("layer_metrics", spec, settings)
    with pytest.raises(LayerMetricError, match=r"round 1 .* not finite, first in 1\.weight"):
        metric.measure([observed(model)], samples, seed=0, device=CPU)

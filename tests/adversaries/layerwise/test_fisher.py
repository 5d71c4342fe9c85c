"""Fisher information leakage against a closed form, and where it is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adversaries.layerwise.fisher import FisherLeakage, noise_of
from fl_privacy import component
from fl_privacy.layers import LayerMetricError
from fl_privacy.testing import check_layer_metric
from fl_privacy.testing.toys import TASK, toy_model, toy_observations, toy_samples
from fl_privacy.types import LayerScores, LocalTraining, Observation, Task

CPU = torch.device("cpu")
SAMPLES = toy_samples(6)


def observed(defense: str = "", **changes: Any) -> list[Observation]:
    """Toy observations whose adversary is told of a ``defense``."""
    defenses = component.create_all("defenses", defense) or None
    return [replace(o, defense=defenses, **changes) for o in toy_observations(2)[0]]


def measured(observations: list[Observation], **settings: Any) -> LayerScores:
    return FisherLeakage(**settings).measure(observations, SAMPLES, seed=0, device=CPU)


def squared_jacobian(weight: Tensor, inputs: Tensor, labels: Tensor, std: float) -> Tensor:
    """||dg/dx||_F^2 of softmax regression, ``g = r u^T``: ``[n]``; u are normalized inputs.

    With r = p - y and S = dr/du it is ``S_cj u_i + r_c delta_ij``, squared and summed.
    """
    p = (inputs @ weight.T).softmax(1)
    r = p - torch.eye(len(weight), dtype=p.dtype)[labels]
    s = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) @ weight
    norms = s.square().sum((1, 2)) * inputs.square().sum(1)
    crossed = 2 * torch.einsum("nci,nc,ni->n", s, r, inputs)
    return (norms + crossed + inputs.shape[1] * r.square().sum(1)) / std**2


def test_a_linear_model_has_its_closed_form() -> None:
    task = Task(input_shape=(5,), classes=3, mean=(0.4,) * 5, std=(0.3,) * 5)
    linear = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 15).view(3, 5).sin())
    (first, *_) = toy_observations(1)[0]
    sent = replace(first.exchanges[0], parameters={"weight": linear.weight.detach()}, buffers={})
    observation = replace(first, exchanges=(sent,), model=lambda: linear, task=task)
    samples = replace(SAMPLES, inputs=SAMPLES.inputs.flatten(1)[:, :5], labels=SAMPLES.labels % 3)
    metric = FisherLeakage(sigma=0.2, batch_size=4, probes=600)
    found = metric.measure([observation], samples, seed=0, device=CPU)
    squares = squared_jacobian(
        linear.weight.detach(), task.normalize(samples.inputs.double()), samples.labels, 0.3
    )
    wanted = squares.mean() / (0.2**2 * 5 * 4**2)
    error = float(found.columns["standard error over probes"])
    assert error < 0.03 * wanted
    assert abs(float(found.values) - wanted) < 4 * error
    assert float(found.columns["mean squared error at least, unbiased"] * found.values) == (
        pytest.approx(1)
    )


def test_it_is_inverse_to_the_squares_of_noise_and_of_batch_size() -> None:
    one = measured(observed(), sigma=0.1, probes=4)
    assert one.layers == ("1", "3")
    assert one.n == len(SAMPLES)
    noisier = measured(observed(), sigma=0.2, probes=4)
    torch.testing.assert_close(noisier.values, one.values / 4)
    larger = measured(observed(), sigma=0.1, probes=4, batch_size=8)
    torch.testing.assert_close(larger.values, one.values / 64)


def test_layers_add_up_to_the_whole_update() -> None:
    """Of all weights together, by double backward, a pixel at a time."""
    model, label = toy_model().double(), SAMPLES.labels[:1]
    weights = [model.get_parameter("1.weight"), model.get_parameter("3.weight")]

    def gradient(x: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(TASK.normalize(x)), label)
        parts = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.cat([part.flatten() for part in parts])

    jacobian = torch.autograd.functional.jacobian(gradient, SAMPLES.inputs[:1].double())  # type: ignore[no-untyped-call]
    wanted = jacobian.square().sum() / (0.1**2 * 36)
    one = replace(SAMPLES, inputs=SAMPLES.inputs[:1], labels=label)
    metric = FisherLeakage(sigma=0.1, probes=600)
    found = metric.measure(toy_observations(1)[0], one, seed=0, device=CPU)
    error = found.columns["standard error over probes"].square().sum().sqrt()
    assert error < 0.03 * wanted
    assert abs(found.values.sum() - wanted) < 4 * error


def test_noise_of_an_update_is_put_in_units_of_the_gradient() -> None:
    (told, _) = observed("gaussian_noise(scale=0.03)")
    assert noise_of(told, None) == pytest.approx(0.03 / 0.1)  # over the learning rate
    assert noise_of(told, 0.5) == 0.5
    (per_step, _) = observed("each_step(defense='gaussian_noise(scale=0.03)')")
    assert noise_of(per_step, None) == 0.03
    by_setting = measured(observed(), sigma=0.3, probes=2).values
    torch.testing.assert_close(measured([told], probes=2).values, by_setting)


@pytest.mark.parametrize("sigma", [None, 0.1])
@pytest.mark.parametrize(
    "defense",
    [
        "laplace_noise(scale=0.1)",
        "dp_sgd(noise_multiplier=1.0)",
        "update_clipping(max_norm=1.0)+gaussian_noise(scale=0.1)",
        "each_step(defense='top_k(k=9)+gaussian_noise(scale=0.1)')",
    ],
)
def test_other_defenses_are_refused(defense: str, sigma: float | None) -> None:
    with pytest.raises(LayerMetricError, match="expected gaussian_noise alone"):
        measured(observed(defense), sigma=sigma)


@pytest.mark.parametrize(
    ("defense", "changes", "reason"),
    [
        ("", {}, "infinite: set sigma, or tell the threat model"),
        ("gaussian_noise(scale=0)", {}, "set sigma above 0"),
        ("gaussian_noise(scale=0.1)", {"local_training": None}, "learning rate.* is unknown"),
        (
            "gaussian_noise(scale=0.1)",
            {"local_training": LocalTraining(algorithm="fedavg", epochs=3)},
            "clients take 3 steps",
        ),
    ],
)
def test_unknown_noise_is_refused(defense: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(LayerMetricError, match=reason):
        measured(observed(defense, **changes))


def test_it_keeps_the_contract() -> None:
    check_layer_metric(FisherLeakage(sigma=1.0, probes=2))

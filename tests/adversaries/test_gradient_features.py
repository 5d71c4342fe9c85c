"""Pooling as Melis et al. have it, on gradients made by hand, and what a classifier is made of."""

import numpy as np
import pytest
import torch

from adversaries.gradient_features import classifier, features, joined, pooled


def test_a_convolution_keeps_the_largest_of_each_kernel() -> None:
    gradient = torch.zeros(1, 2, 3, 2, 2)
    gradient[0, 0, 0] = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    gradient[0, 1, 2] = torch.tensor([[-0.5, 0.1], [0.2, 0.3]])
    assert pooled(gradient).tolist() == [[4.0, 0.0, 0.0, 0.0, 0.0, 0.5]]
    signal = torch.tensor([[[[1.0, -2.0, 0.5]]]])  # one filter of length 3
    assert pooled(signal).tolist() == [[2.0]]


def test_a_dense_matrix_of_more_than_5000_entries_keeps_the_largest_of_each_row() -> None:
    least = torch.arange(5000.0).reshape(1, 50, 100)
    assert torch.equal(pooled(-least), least.flatten(1))
    more = torch.arange(5050.0).reshape(1, 50, 101)
    more[0, 3, 7] = -9999.0
    expected = more[0, :, -1].clone()
    expected[3] = 9999.0
    assert torch.equal(pooled(more), expected[None])


def test_each_batch_is_pooled_alone_and_biases_are_left_out() -> None:
    gradients = {
        "conv.weight": torch.randn(4, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0)),
        "conv.bias": torch.full((4, 2), 1e9),
        "fc.weight": torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1)),
    }
    found = features(gradients, ("conv", "fc"))
    assert {name: tuple(f.shape) for name, f in found.items()} == {"conv": (4, 2), "fc": (4, 10)}
    alone = features({n: g[2:3] for n, g in gradients.items()}, ("conv", "fc"))
    assert all(torch.equal(found[n][2:3], alone[n]) for n in found)
    assert torch.equal(joined(found, ("fc", "conv"))[:, :10], found["fc"])
    assert float(joined(found, ("conv", "fc")).max()) < 1e3


@pytest.mark.parametrize("family", ["forest", "logistic", "mlp"])
def test_a_classifier_does_not_see_how_long_a_gradient_is(family: str) -> None:
    draw = np.random.default_rng(0)
    truth = np.arange(40) % 2 == 0
    rows = np.abs(draw.normal(size=(40, 6))) + 2 * truth[:, None] * np.eye(6)[0]
    fitted = classifier(family, 3).fit(rows, truth)  # type: ignore[arg-type]
    scaled = rows * draw.uniform(0.1, 10, size=(40, 1))
    assert fitted.predict_proba(scaled) == pytest.approx(fitted.predict_proba(rows), abs=1e-6)
    right = fitted.predict_proba(rows)[:, 1]
    assert right[truth].mean() > right[~truth].mean() + 0.3

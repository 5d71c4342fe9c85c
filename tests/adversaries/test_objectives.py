import torch
from torch.nn.functional import cosine_similarity

from adversaries.objectives import (
    cosine_distance,
    normalized,
    squared_distance,
    squared_norm,
    total_variation,
)
from fl_privacy.types import Tensors


def distance(simulated: Tensors, observed: Tensors) -> torch.Tensor:
    """The cosine distance, the observed gradient being normalized as the attack does."""
    unit = normalized({n: t[None] for n, t in observed.items()})
    return cosine_distance(simulated, {n: t[0] for n, t in unit.items()})


def gradients(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, 3, generator=generator, dtype=torch.float64) for n in "abc"}


def test_cosine_distance_is_that_of_the_flattened_gradient() -> None:
    one, other = gradients(0), gradients(1)
    flat = [torch.cat([t.flatten() for t in g.values()]) for g in (one, other)]
    expected = 1 - cosine_similarity(flat[0], flat[1], dim=0)
    torch.testing.assert_close(distance(one, other), expected)


def test_cosine_distance_ignores_scale_and_reaches_its_bounds() -> None:
    g = gradients(0)
    assert distance(g, {n: 7 * t for n, t in g.items()}).abs() < 1e-12
    assert (distance(g, {n: -t for n, t in g.items()}) - 2).abs() < 1e-12


def test_cosine_distance_compares_only_what_was_observed() -> None:
    g = gradients(0)
    seen = {"b": g["b"], "c": g["c"]}
    assert distance({**g, "a": g["a"] * 100}, seen).abs() < 1e-12


def test_squared_norm_adds_all_tensors() -> None:
    assert squared_norm({"a": torch.full((2,), 3.0), "b": torch.full((1,), 4.0)}).item() == 34


def test_total_variation_of_known_pictures() -> None:
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    assert total_variation(ramp, 2).item() == 1.0  # one step a column, none a row
    checkerboard = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).float()
    assert total_variation(checkerboard.view(1, 1, 4, 4), 2).item() == 2.0
    assert total_variation(torch.ones(1, 3, 4, 4), 2).item() == 0.0


def test_total_variation_of_signals_and_of_single_values() -> None:
    assert total_variation(torch.tensor([[[0.0, 1.0, 3.0]]]), 1).item() == 1.5
    assert total_variation(torch.ones(2, 7), 0).item() == 0.0


def test_squared_distance_compares_only_what_was_observed() -> None:
    g = gradients(0)
    moved = {**g, "a": g["a"] + 2.0}
    torch.testing.assert_close(squared_distance(moved, g), torch.tensor(48.0).double())
    assert squared_distance(moved, {"b": g["b"]}).item() == 0

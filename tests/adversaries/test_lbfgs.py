"""Batched L-BFGS against theory and against itself alone."""

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from adversaries.lbfgs import minimize


def evaluator(objective: object) -> object:
    def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
        gradient, values = vmap(grad_and_value(objective))(points)  # type: ignore[arg-type]
        return gradient, values

    return evaluate


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def starts(lanes: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(lanes, n, generator=generator, dtype=torch.float64)


def test_quadratics_are_solved_to_machine_precision() -> None:
    scales = torch.logspace(0, 3, 12, dtype=torch.float64)
    found, values = minimize(
        evaluator(lambda x: (scales * (x - 3) ** 2).sum()),  # type: ignore[arg-type]
        starts(5, 12),
        evaluations=200,
    )
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=1e-6, rtol=0)
    assert values.max() < 1e-12


def test_rosenbrock_reaches_its_minimum_from_every_start() -> None:
    found, values = minimize(evaluator(rosenbrock), starts(8, 2), evaluations=300)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-4, rtol=0)
    assert values.max() < 1e-8


def test_the_value_of_each_lane_never_rises() -> None:
    history: list[Tensor] = []
    minimize(
        evaluator(rosenbrock),  # type: ignore[arg-type]
        starts(6, 4),
        evaluations=80,
        advance=lambda _, values: history.append(values.clone()),
    )
    values = torch.stack(history)
    assert (values.diff(dim=0) <= 0).all()
    assert len(history) == 79


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e200])
def test_a_lane_that_diverges_changes_no_other(poison: float) -> None:
    clean = starts(3, 4)
    spoiled = torch.cat([clean, torch.full((1, 4), poison, dtype=torch.float64)])
    alone, _ = minimize(evaluator(rosenbrock), clean, evaluations=60)  # type: ignore[arg-type]
    together, _ = minimize(evaluator(rosenbrock), spoiled, evaluations=60)  # type: ignore[arg-type]
    torch.testing.assert_close(together[:3], alone, rtol=1e-9, atol=1e-9)


def test_steep_walls_are_searched_back_from() -> None:
    """The first step lands where the objective is infinite; the line search comes back."""
    found, values = minimize(
        evaluator(lambda x: (x - torch.log(x)).sum()),  # type: ignore[arg-type]
        torch.full((2, 3), 1e-3, dtype=torch.float64),
        evaluations=120,
    )
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)
    torch.testing.assert_close(values, torch.full_like(values, 3.0), atol=1e-9, rtol=0)

"""The conformance checks accept what keeps the contract and name what breaks it."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from clients.defenses.gaussian_noise import GaussianNoise
from clients.defenses.per_sample_clipping import PerSampleClipping
from fl_privacy import component
from fl_privacy.component import Component
from fl_privacy.metrics.preparing import Preparing
from fl_privacy.testing import check_adversary, check_defense, check_layer_metric, check_metric
from fl_privacy.types import (
    Failure,
    LayerScores,
    Observation,
    Outcome,
    Reconstruction,
    Result,
    Samples,
    Stats,
    Step,
    Tensors,
)


class Grey(Component):
    """Keeps the contract, unless told how to break it."""

    requires: ClassVar[frozenset[str]] = frozenset()
    fault: str = ""

    def attack(
        self, observations: Sequence[Observation], **context: Any
    ) -> Iterator[Reconstruction | Failure]:
        order = reversed(observations) if self.fault == "order" else observations
        for i, target in enumerate(order):
            yield self.answer(i, target, observations)

    def answer(
        self, place: int, target: Observation, observations: Sequence[Observation]
    ) -> Reconstruction | Failure:
        level = 0.5
        match self.fault:
            case "silent failure":
                return Failure(target.key, "")
            case "torch":
                level = float(torch.rand(()))
            case "numpy":
                level = float(np.random.rand())  # noqa: NPY002
            case "python":
                level = random.random()
            case "place":
                level = 0.1 * place
            case "mates":
                total = sum(float(u.sum()) for o in observations for u in updates(o))
                level = abs(total) % 1
            case "range":
                level = 2.0
            case "labels":
                return Reconstruction(
                    target.key, grey(target, 0.5), torch.zeros(2).long(), Outcome("completed")
                )
        labels = torch.zeros(1, dtype=torch.int64)
        return Reconstruction(target.key, grey(target, level), labels, Outcome("completed"))


def updates(observation: Observation) -> Iterator[Tensor]:
    for exchange in observation.exchanges:
        yield from exchange.update.values()


def grey(target: Observation, level: float) -> Tensor:
    return torch.full((1, *target.task.input_shape), level)


def test_an_adversary_that_keeps_the_contract_passes() -> None:
    check_adversary(Grey())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("order", "keep the order"),
        ("silent failure", "needs a reason"),
        ("torch", "global random state"),
        ("numpy", "global random state"),
        ("python", "global random state"),
        ("place", "position or its mates"),
        ("mates", "position or its mates"),
        ("range", r"pixels in \[0.0, 1.0\]"),
        ("labels", "expected 1 labels"),
    ],
)
def test_an_adversary_that_breaks_it_is_told_how(fault: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_adversary(Grey(fault=fault))


class Scaled(Component):
    """An update defense, unless told how to break."""

    fault: str = ""

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        if self.fault == "in place":
            for value in update.values():
                value.mul_(0.5)
            return update, {}
        if self.fault == "names":
            return {f"x{n}": u for n, u in update.items()}, {}
        if self.fault == "type":
            return {n: u.double() for n, u in update.items()}, {}
        if self.fault == "nan":
            return {n: u * torch.nan for n, u in update.items()}, {}
        if self.fault == "global":
            return {n: u + torch.randn(u.shape) for n, u in update.items()}, {}
        if self.fault == "stats":
            return dict(update), {"norm": torch.zeros(3)}
        return {n: 0.5 * u for n, u in update.items()}, {"scale": 0.5}


class Detached(Component):
    """A gradient defense that no adaptive adversary can look through."""

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "shuffle"

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        defended, stats = PerSampleClipping(max_norm=1.0).defend_gradient(step, generator=generator)
        return {n: g.detach() for n, g in defended.items()}, stats


@pytest.mark.parametrize(
    "defense", [Scaled(), GaussianNoise(scale=0.1), PerSampleClipping(max_norm=1.0)]
)
def test_defenses_that_keep_the_contract_pass(defense: Any) -> None:
    check_defense(defense)


@pytest.mark.parametrize(
    ("defense", "reason"),
    [
        (Scaled(fault="in place"), "changed in place"),
        (Scaled(fault="names"), "expected tensors"),
        (Scaled(fault="type"), "torch.float64"),
        (Scaled(fault="nan"), "not finite"),
        (Scaled(fault="global"), "global random state"),
        (Scaled(fault="stats"), "statistic norm"),
        (Detached(), "detached from the inputs"),
        (Grey(), "expected defend_gradient"),
    ],
)
def test_defenses_that_break_it_are_told_how(defense: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_defense(defense)


class Closeness(Component):
    """Negative distance to the truth, unless told how to break."""

    unit: ClassVar[str] = "1"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False
    fault: str = ""

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        found = [r.inputs for r in results if isinstance(r, Reconstruction)]
        if self.fault == "spoils":
            truths[0].inputs.zero_()
        distances = [float((a - t.inputs).abs().sum()) for a, t in zip(found, truths, strict=True)]
        values = torch.tensor(distances) * (1 if self.fault == "direction" else -1)
        return values[:1] if self.fault == "count" else values


def test_metrics_are_held_to_their_contract() -> None:
    check_metric(Closeness())
    built_in = [component.create("metrics", name) for name in component.BUILT_IN["metrics"]]
    for metric in built_in:
        if not isinstance(metric, Preparing):  # those are checked, prepared, in tests of their own
            check_metric(metric)
    for fault, reason in (
        ("spoils", "a metric is pure"),
        ("direction", "higher_is_leakier"),
        ("count", "expected 4 values"),
    ):
        with pytest.raises(AssertionError, match=reason):
            check_metric(Closeness(fault=fault))


class Norms(Component):
    """The norm of each layer's mean update, unless told how to break."""

    needs: ClassVar[Literal["updates", "property", "data"]] = "updates"
    fault: str = ""

    def measure(
        self, observations: Sequence[Observation], samples: Samples | None, **context: Any
    ) -> LayerScores:
        (first, *_) = observations
        names = tuple(first.exchanges[0].update)
        values = torch.stack([first.exchanges[0].update[n].norm() for n in names])
        if self.fault == "random":
            values = values + torch.rand(())
        if self.fault == "shape":
            values = values[1:]
        return LayerScores("norms", "" if self.fault == "unit" else "1", names, values)


def test_layer_metrics_are_held_to_their_contract() -> None:
    check_layer_metric(Norms())
    for fault, reason in (
        ("random", "random state"),
        ("shape", "values must be"),
        ("unit", "unit"),
    ):
        with pytest.raises(AssertionError, match=reason):
            check_layer_metric(Norms(fault=fault))

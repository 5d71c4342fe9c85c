"""The conformance checks themselves; what each expects stands in its docstring."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.protocols import (
    Adversary,
    GradientDefense,
    LayerMetric,
    Metric,
    ObservedMetric,
    UpdateDefense,
)
from fl_privacy.seeding import generator
from fl_privacy.testing.toys import TASK, toy_model, toy_observations, toy_samples, toy_step
from fl_privacy.types import (
    Failure,
    Observation,
    Outcome,
    PropertyScores,
    Reconstruction,
    Representations,
    Result,
    Samples,
    Step,
    Task,
    Tensors,
)

T = TypeVar("T")
CPU = torch.device("cpu")
OPTIONAL = ("labels", "local_training", "auxiliary", "own_update", "defense")
"""Fields of an `Observation` that a threat model may withhold."""


def check_adversary(
    adversary: Adversary, *, observations: Sequence[Observation] | None = None
) -> None:
    """Check that an adversary keeps the contract of `fl_privacy.protocols.Adversary`.

    One result for each observation, in order, with its key; shapes and pixel range;
    equal seeds give equal bytes; a target's result does not depend on its mates or
    position (at the adversary's own ``width``, which has to be set for that); global
    random state and the observed update stay untouched; what is not required is not needed.

    ``observations`` default to one-image gradients of a small dense network.
    """
    if observations is None:
        made, truths = toy_observations()
        known = replace(toy_samples(8, seed=1), properties={"property": torch.arange(8) // 4})
        observations = [
            replace(o, labels=t.labels, auxiliary=known) for o, t in zip(made, truths, strict=True)
        ]
    unknown = sorted(adversary.requires - set(OPTIONAL))
    _expect(not unknown, f"requires names {unknown}, which are none of {OPTIONAL}")
    stripped = [_strip(o, adversary.requires) for o in observations]
    before = [_copied(e.update) for o in stripped for e in o.exchanges]

    results = _unchanged_random_state(lambda: _attack(adversary, stripped))
    _check_results(results, stripped)
    after = [_copied(e.update) for o in stripped for e in o.exchanges]
    _expect(
        all(_same_tensors(b, a) for b, a in zip(before, after, strict=True)),
        "the observed updates were changed; treat them as read-only",
    )
    _expect(
        _same_results(results, _attack(adversary, stripped)),
        "the same seed gave different results; draw from fl_privacy.seeding.generator only",
    )
    _check_independence(_with_width(adversary, len(stripped)), stripped)
    _expect(
        list(adversary.attack([], seed=0, device=CPU)) == [],
        "no observations must give no results",
    )


def check_defense(defense: GradientDefense | UpdateDefense) -> None:
    """Check that a defense keeps its protocol.

    Same names, shapes and dtypes out as in; finite; its input untouched; all randomness
    from the given generator; numeric statistics. A gradient defense must also let an
    adaptive adversary differentiate through it.
    """
    _expect(
        isinstance(defense, GradientDefense | UpdateDefense),
        "expected defend_gradient(step, *, generator) or defend_update(update, *, generator)",
    )
    if isinstance(defense, UpdateDefense):
        update = {n: 0.1 * torch.ones_like(p) for n, p in toy_model().named_parameters()}
        _check_defended(lambda g: defense.defend_update(update, generator=g), update)
    if isinstance(defense, GradientDefense):
        _expect(
            defense.sampling in ("shuffle", "poisson"),
            f"sampling must be 'shuffle' or 'poisson', got {defense.sampling!r}",
        )
        step = toy_step()
        _check_defended(lambda g: defense.defend_gradient(step, generator=g), dict(step.parameters))
        _check_differentiable(defense, step)


def check_layer_metric(metric: LayerMetric) -> None:
    """Check that a layer metric keeps its protocol: a value a layer, finite, repeatable."""
    _expect(
        metric.needs in ("updates", "property", "data"),
        f"needs must be 'updates', 'property' or 'data', got {metric.needs!r}",
    )
    observations, _ = toy_observations(8)
    samples = replace(toy_samples(16), properties={"property": torch.arange(16) % 2})
    given = None if metric.needs == "updates" else samples

    def measure() -> Tensor:
        scores = metric.measure(observations, given, seed=0, device=CPU)
        _expect(len(scores.layers) > 0, "no layer was measured")
        _expect(
            scores.values.shape == (len(scores.layers),),
            f"values must be [{len(scores.layers)}], got {tuple(scores.values.shape)}",
        )
        _expect(bool(scores.unit), "the unit is empty; write '1' for a pure number")
        return scores.values

    first = measure()  # what it imports may draw as it is imported, as rich does
    again = _unchanged_random_state(measure)
    _expect(torch.equal(first, again), "the same seed gave different values")


def check_metric(metric: Metric) -> None:
    """Check that a metric keeps its protocol: pure, one value a result, better when exact."""
    _expect(bool(metric.unit), "the unit is empty; write '1' for a pure number")
    truths = [
        replace(toy_samples(1, seed=i), properties={"property": torch.tensor([i % 2])})
        for i in range(4)
    ]
    exact, wrong = _results(metric, truths)
    count = 1 if metric.set_level else len(truths)
    kept = [_copied({"inputs": t.inputs, "labels": t.labels}) for t in truths]
    score = _scoring(metric, len(truths))
    scores = _unchanged_random_state(lambda: score(exact, truths))
    _expect(scores.shape == (count,), f"expected {count} values, got {tuple(scores.shape)}")
    _expect(
        all(
            _same_tensors(k, {"inputs": t.inputs, "labels": t.labels})
            for k, t in zip(kept, truths, strict=True)
        ),
        "the truths were changed; a metric is pure",
    )
    if metric.unit.startswith("share"):
        inside = bool(((scores >= 0) & (scores <= 1) | scores.isnan()).all())
        _expect(inside, f"a unit that begins with 'share' means values in [0, 1], got {scores}")
    if not bool(scores.isfinite().all()):
        return
    gain = scores.mean() - score(wrong, truths).mean()
    _expect(
        float(gain if metric.higher_is_leakier else -gain) > 0,
        "exact results do not score as leakier than random or wrong ones; check higher_is_leakier",
    )


def _results(
    metric: Metric, truths: Sequence[Samples]
) -> tuple[Sequence[Result], Sequence[Result]]:
    """Exact and wrong results, of a kind that the metric scores."""
    if Reconstruction in getattr(metric, "kinds", (Reconstruction,)):
        noise = generator(0, "check_metric")
        return [_reconstruction(t.inputs, t.labels) for t in truths], [
            _reconstruction(
                torch.rand(t.inputs.shape, generator=noise), (t.labels + 1) % TASK.classes
            )
            for t in truths
        ]
    held = [t.properties["property"].double() for t in truths]
    return [_property_scores(has) for has in held], [_property_scores(1 - has) for has in held]


def _scoring(metric: Metric, count: int) -> Callable[[Sequence[Result], Sequence[Samples]], Tensor]:
    """How a metric scores ``count`` results, of toy observations where it wants to see any."""
    if not isinstance(metric, ObservedMetric):
        return metric.score
    observations, _ = toy_observations(count)
    metric.check_observed(observations[0])
    return partial(metric.score_observed, observations=observations)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _attack(adversary: Adversary, observations: Sequence[Observation]) -> list[Result | Failure]:
    return list(adversary.attack(observations, seed=0, device=CPU))


def _strip(observation: Observation, requires: frozenset[str]) -> Observation:
    denied = {name: None for name in OPTIONAL if name not in requires}
    return replace(observation, **denied)  # type: ignore[arg-type]


def _with_width(adversary: Adversary, width: int) -> Adversary:
    """The adversary at a fixed batch width, if it has one to set."""
    if getattr(adversary, "width", width) is None and isinstance(adversary, Component):
        return adversary.model_copy(update={"width": width})
    return adversary


def _check_independence(adversary: Adversary, observations: Sequence[Observation]) -> None:
    together = _attack(adversary, observations)
    reversed_order = _attack(adversary, observations[::-1])[::-1]
    alone = [_attack(adversary, [observation])[0] for observation in observations]
    for others in (reversed_order, alone):
        _expect(
            _same_results(together, others),
            "a result depends on its position or its mates; treat each target on its own, seed it "
            "by its key, and pad to a fixed width",
        )


def _check_results(
    results: Sequence[Result | Failure], observations: Sequence[Observation]
) -> None:
    _expect(
        len(results) == len(observations),
        f"expected one result for each of {len(observations)} observations, got {len(results)}",
    )
    for result, observation in zip(results, observations, strict=True):
        _expect(
            result.key == observation.key,
            f"expected the result of {observation.key}, got {result.key}: keep the order",
        )
        if isinstance(result, Failure):
            _expect(bool(result.reason), "a Failure needs a reason that says what would help")
        elif isinstance(result, PropertyScores):
            for scores in (result.scores, *result.by_layer.values()):
                _expect(
                    scores.shape == (len(observation.exchanges),),
                    f"expected one score for each of {len(observation.exchanges)} exchanges, "
                    f"got {tuple(scores.shape)}",
                )
        elif isinstance(result, Representations):
            _check_representations(result, observation.task)
        else:
            _check_reconstruction(result, observation.task)


def _check_reconstruction(result: Reconstruction, task: Task) -> None:
    _expect(
        tuple(result.inputs.shape[1:]) == task.input_shape,
        f"inputs must be [n, {', '.join(map(str, task.input_shape))}], "
        f"got {tuple(result.inputs.shape)}",
    )
    _expect(
        result.labels.shape == result.inputs.shape[:1],
        f"expected {len(result.inputs)} labels, got {tuple(result.labels.shape)}",
    )
    low, high = float(result.inputs.min()), float(result.inputs.max())
    _expect(
        task.low - 1e-4 <= low and high <= task.high + 1e-4,
        f"inputs must be pixels in [{task.low}, {task.high}], got [{low:.3f}, {high:.3f}]; "
        f"use Task.denormalize and clamp",
    )


def _check_representations(result: Representations, task: Task) -> None:
    classes = result.classes
    _expect(
        classes.ndim == 1 and bool(torch.isin(classes, torch.arange(task.classes)).all()),
        f"classes must be [c] of 0..{task.classes - 1}, got {classes}",
    )
    _expect(bool((classes.diff() > 0).all()), f"classes must ascend, each one once, got {classes}")
    for name, rows in result.layers.items():
        _expect(
            rows.ndim == 2 and len(rows) == len(classes) and bool(rows.isfinite().all()),
            f"{name}: expected finite rows [{len(classes)}, features], got {tuple(rows.shape)}",
        )


def _check_defended(
    defend: Callable[[torch.Generator], tuple[Tensors, object]], like: Tensors
) -> None:
    before = _copied(like)
    defended, stats = _unchanged_random_state(lambda: defend(generator(0, "defense")))
    _expect(_same_tensors(before, like), "the input was changed in place; return new tensors")
    _expect(list(defended) == list(like), f"expected tensors {list(like)}, got {list(defended)}")
    for name, tensor in like.items():
        got = defended[name]
        _expect(
            got.shape == tensor.shape and got.dtype == tensor.dtype,
            f"{name}: expected {tuple(tensor.shape)} {tensor.dtype}, "
            f"got {tuple(got.shape)} {got.dtype}",
        )
        _expect(bool(got.isfinite().all()), f"{name}: values are not finite")
    again, _ = defend(generator(0, "defense"))
    _expect(_same_tensors(defended, again), "equal generators gave different results")
    _expect(isinstance(stats, dict), f"statistics must be a dict of numbers, got {type(stats)}")
    for name, value in (stats if isinstance(stats, dict) else {}).items():
        scalar = isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
        _expect(
            scalar and not math.isnan(float(value)),
            f"statistic {name} must be a number or a 0-d tensor, got {value!r}",
        )


def _check_differentiable(defense: GradientDefense, step: Step) -> None:
    inputs = step.inputs.clone().requires_grad_(True)
    defended, _ = defense.defend_gradient(
        replace(step, inputs=inputs), generator=generator(0, "defense")
    )
    total = torch.stack([t.square().sum() for t in defended.values()]).sum()
    _expect(
        total.requires_grad,
        "the defended gradient is detached from the inputs; an adaptive adversary has to "
        "differentiate through defend_gradient (no .detach(), no .item(), no numpy)",
    )
    (slope,) = torch.autograd.grad(total, inputs)
    _expect(bool(slope.isfinite().all()), "the derivative of the defended gradient is not finite")


def _unchanged_random_state(call: Callable[[], T]) -> T:
    before = _random_states()
    result = call()
    _expect(
        before == _random_states(),
        "a global random state was used (torch, numpy or random); draw from a generator",
    )
    return result


def _random_states() -> tuple[bytes, str, str]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch_state = bytes(torch.random.get_rng_state().numpy())
    return torch_state, str(numpy_state), str(random.getstate())


def _copied(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _same_tensors(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def _same_results(a: Sequence[Result | Failure], b: Sequence[Result | Failure]) -> bool:
    return len(a) == len(b) and all(_same_result(x, y) for x, y in zip(a, b, strict=True))


def _same_result(a: Result | Failure, b: Result | Failure) -> bool:
    if isinstance(a, Reconstruction) and isinstance(b, Reconstruction):
        return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)
    if isinstance(a, PropertyScores) and isinstance(b, PropertyScores):
        return _same_tensors({"": a.scores, **a.by_layer}, {"": b.scores, **b.by_layer})
    if isinstance(a, Representations) and isinstance(b, Representations):
        return torch.equal(a.classes, b.classes) and _same_tensors(a.layers, b.layers)
    return a == b


def _reconstruction(inputs: Tensor, labels: Tensor) -> Reconstruction:
    return Reconstruction("0", inputs.clone(), labels, Outcome("completed"))


def _property_scores(scores: Tensor) -> PropertyScores:
    return PropertyScores("0", scores, Outcome("completed"), property="property")

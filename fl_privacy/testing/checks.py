"""The conformance checks themselves; what each expects stands in its docstring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

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
from fl_privacy.testing.answers import check_results, same_results
from fl_privacy.testing.expecting import (
    copied,
    expect,
    same_tensors,
    unchanged_random_state,
)
from fl_privacy.testing.toys import TASK, toy_model, toy_observations, toy_samples, toy_step
from fl_privacy.types import (
    Failure,
    Observation,
    Outcome,
    PropertyScores,
    Reconstruction,
    Result,
    Samples,
    Step,
    Tensors,
)

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
    expect(not unknown, f"requires names {unknown}, which are none of {OPTIONAL}")
    stripped = [_strip(o, adversary.requires) for o in observations]
    before = [copied(e.update) for o in stripped for e in o.exchanges]

    results = unchanged_random_state(lambda: _attack(adversary, stripped))
    check_results(results, stripped)
    after = [copied(e.update) for o in stripped for e in o.exchanges]
    expect(
        all(same_tensors(b, a) for b, a in zip(before, after, strict=True)),
        "the observed updates were changed; treat them as read-only",
    )
    expect(
        same_results(results, _attack(adversary, stripped)),
        "the same seed gave different results; draw from fl_privacy.seeding.generator only",
    )
    _check_independence(_with_width(adversary, len(stripped)), stripped)
    expect(
        list(adversary.attack([], seed=0, device=CPU)) == [],
        "no observations must give no results",
    )


def check_defense(defense: GradientDefense | UpdateDefense) -> None:
    """Check that a defense keeps its protocol.

    Same names, shapes and dtypes out as in; finite; its input untouched; all randomness
    from the given generator; numeric statistics. A gradient defense must also let an
    adaptive adversary differentiate through it.
    """
    expect(
        isinstance(defense, GradientDefense | UpdateDefense),
        "expected defend_gradient(step, *, generator) or defend_update(update, *, generator)",
    )
    if isinstance(defense, UpdateDefense):
        update = {n: 0.1 * torch.ones_like(p) for n, p in toy_model().named_parameters()}
        _check_defended(lambda g: defense.defend_update(update, generator=g), update)
    if isinstance(defense, GradientDefense):
        expect(
            defense.sampling in ("shuffle", "poisson"),
            f"sampling must be 'shuffle' or 'poisson', got {defense.sampling!r}",
        )
        step = toy_step()
        _check_defended(lambda g: defense.defend_gradient(step, generator=g), dict(step.parameters))
        _check_differentiable(defense, step)


def check_layer_metric(metric: LayerMetric) -> None:
    """Check that a layer metric keeps its protocol: a value a layer, finite, repeatable."""
    expect(
        metric.needs in ("updates", "property", "data"),
        f"needs must be 'updates', 'property' or 'data', got {metric.needs!r}",
    )
    observations, _ = toy_observations(8)
    samples = replace(toy_samples(16), properties={"property": torch.arange(16) // 4 % 2})
    given = None if metric.needs == "updates" else samples

    def measure() -> Tensor:
        scores = metric.measure(observations, given, seed=0, device=CPU)
        expect(len(scores.layers) > 0, "no layer was measured")
        expect(
            scores.values.shape == (len(scores.layers),),
            f"values must be [{len(scores.layers)}], got {tuple(scores.values.shape)}",
        )
        expect(bool(scores.unit), "the unit is empty; write '1' for a pure number")
        return scores.values

    first = measure()  # what it imports may draw as it is imported, as rich does
    again = unchanged_random_state(measure)
    expect(torch.equal(first, again), "the same seed gave different values")


def check_metric(metric: Metric) -> None:
    """Check that a metric keeps its protocol: pure, one value a result, better when exact."""
    expect(bool(metric.unit), "the unit is empty; write '1' for a pure number")
    truths = [
        replace(toy_samples(1, seed=i), properties={"property": torch.tensor([i % 2])})
        for i in range(4)
    ]
    exact, wrong = _results(metric, truths)
    count = 1 if metric.set_level else len(truths)
    kept = [copied({"inputs": t.inputs, "labels": t.labels}) for t in truths]
    score = _scoring(metric, len(truths))
    scores = unchanged_random_state(lambda: score(exact, truths))
    expect(scores.shape == (count,), f"expected {count} values, got {tuple(scores.shape)}")
    expect(
        all(
            same_tensors(k, {"inputs": t.inputs, "labels": t.labels})
            for k, t in zip(kept, truths, strict=True)
        ),
        "the truths were changed; a metric is pure",
    )
    if metric.unit.startswith("share"):
        inside = bool(((scores >= 0) & (scores <= 1) | scores.isnan()).all())
        expect(inside, f"a unit that begins with 'share' means values in [0, 1], got {scores}")
    if not bool(scores.isfinite().all()):
        return
    gain = scores.mean() - score(wrong, truths).mean()
    expect(
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
        expect(
            same_results(together, others),
            "a result depends on its position or its mates; treat each target on its own, seed it "
            "by its key, and pad to a fixed width",
        )


def _check_defended(
    defend: Callable[[torch.Generator], tuple[Tensors, object]], like: Tensors
) -> None:
    before = copied(like)
    defended, stats = unchanged_random_state(lambda: defend(generator(0, "defense")))
    expect(same_tensors(before, like), "the input was changed in place; return new tensors")
    expect(list(defended) == list(like), f"expected tensors {list(like)}, got {list(defended)}")
    for name, tensor in like.items():
        got = defended[name]
        expect(
            got.shape == tensor.shape and got.dtype == tensor.dtype,
            f"{name}: expected {tuple(tensor.shape)} {tensor.dtype}, "
            f"got {tuple(got.shape)} {got.dtype}",
        )
        expect(bool(got.isfinite().all()), f"{name}: values are not finite")
    again, _ = defend(generator(0, "defense"))
    expect(same_tensors(defended, again), "equal generators gave different results")
    expect(isinstance(stats, dict), f"statistics must be a dict of numbers, got {type(stats)}")
    for name, value in (stats if isinstance(stats, dict) else {}).items():
        scalar = isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
        expect(
            scalar and not math.isnan(float(value)),
            f"statistic {name} must be a number or a 0-d tensor, got {value!r}",
        )


def _check_differentiable(defense: GradientDefense, step: Step) -> None:
    inputs = step.inputs.clone().requires_grad_(True)
    defended, _ = defense.defend_gradient(
        replace(step, inputs=inputs), generator=generator(0, "defense")
    )
    total = torch.stack([t.square().sum() for t in defended.values()]).sum()
    expect(
        total.requires_grad,
        "the defended gradient is detached from the inputs; an adaptive adversary has to "
        "differentiate through defend_gradient (no .detach(), no .item(), no numpy)",
    )
    (slope,) = torch.autograd.grad(total, inputs)
    expect(bool(slope.isfinite().all()), "the derivative of the defended gradient is not finite")


def _reconstruction(inputs: Tensor, labels: Tensor) -> Reconstruction:
    return Reconstruction("0", inputs.clone(), labels, Outcome("completed"))


def _property_scores(scores: Tensor) -> PropertyScores:
    return PropertyScores("0", scores, Outcome("completed"), property="property")

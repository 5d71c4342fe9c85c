"""The baseline defenses on updates and gradients: counts, norms, distributions, purity."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.func import grad, vmap

from clients.defending import step_of
from clients.defenses.each_step import EachStep, mean_gradient
from clients.defenses.gradient_compression import GradientCompression
from clients.defenses.laplace_noise import LaplaceNoise
from clients.defenses.largest import largest
from clients.defenses.top_k import TopK
from clients.defenses.update_clipping import UpdateClipping
from clients.defenses.withhold import Withhold
from clients.training import local_train
from fl_privacy.component import ComponentError, create, create_all, spec_of
from fl_privacy.defenses import split_defenses
from fl_privacy.models.mlp import MLP
from fl_privacy.models.soteria import ConvNet64
from fl_privacy.protocols import GradientDefense, UpdateDefense
from fl_privacy.testing import check_defense
from fl_privacy.types import LocalTraining, Samples, Step, Task, Tensors

TASK = Task(input_shape=(1, 9, 9), classes=3, mean=(0.2,), std=(0.5,))
SPECS = [
    "gradient_compression",
    "gradient_compression(rate=0.5, per='tensor')",
    "top_k(k=3)",
    "top_k(share=0.2)",
    "gaussian_noise(scale=0.1)",
    "laplace_noise(scale=0.1)",
    "update_clipping(max_norm=0.01)",
    "withhold(layers=('1.weight',))",
    "each_step(defense='gradient_compression(rate=0.5)+update_clipping(max_norm=0.1)')",
    "each_step(defense='laplace_noise(scale=0.001)')",
]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def update(*, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (3, 6), "scale": ()}
    draws = seeded(3)
    return {n: torch.randn(s, generator=draws, dtype=dtype) for n, s in shapes.items()}


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([value.flatten() for value in tensors.values()])


def defended(spec: str, given_update: Tensors) -> dict[str, Tensor]:
    out, _ = create("defenses", spec).defend_update(given_update, generator=seeded())
    return dict(out)


@pytest.mark.parametrize("spec", SPECS)
def test_every_one_keeps_the_contract(spec: str) -> None:
    defense = create("defenses", spec)
    check_defense(defense)
    assert create("defenses", spec_of("defenses", defense)) == defense


@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, math.inf, math.nan]), max_size=12),
    st.integers(-1, 13),
)
@settings(max_examples=200, deadline=None)
def test_exactly_so_many_of_the_largest_are_chosen_equals_by_position(
    values: list[float], keep: int
) -> None:
    """Against Python's stable sort."""
    size = [math.inf if math.isnan(v) else abs(v) for v in values]
    ranked = sorted(range(len(values)), key=lambda i: -size[i])
    mask = largest(torch.tensor(values, dtype=torch.float32), keep)
    assert mask.nonzero().flatten().tolist() == sorted(ranked[: max(keep, 0)])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("per", ["model", "tensor"])
def test_compression_zeroes_the_stated_share_and_nothing_larger(rate: float, per: str) -> None:
    before = update()
    after = defended(f"gradient_compression(rate={rate}, per={per!r})", before)
    groups = [list(before)] if per == "model" else [[name] for name in before]
    for names in groups:
        old, new = flat({n: before[n] for n in names}), flat({n: after[n] for n in names})
        zeroed = new == 0
        assert int(zeroed.sum()) == round(rate * len(old))
        assert torch.equal(new[~zeroed], old[~zeroed])
        if 0 < int(zeroed.sum()) < len(old):
            assert old[zeroed].abs().max() <= old[~zeroed].abs().min()


@pytest.mark.parametrize("rate", [10, 40, 80])
def test_compression_of_a_tensor_is_the_percentile_of_the_authors_but_for_one_entry(
    rate: int,
) -> None:
    """Their way: everything below numpy's percentile of the magnitudes of a tensor."""
    before = {"w": update()["a.weight"], "v": update()["b.weight"]}
    after = defended(f"gradient_compression(rate={rate / 100}, per='tensor')", before)
    for name, value in before.items():
        size = value.abs().numpy()
        theirs = np.where(size < np.percentile(size, rate), 0, value)
        assert np.count_nonzero(theirs != after[name].numpy()) <= 1


def test_compression_of_all_zeros_and_of_infinities_is_finite_where_it_says_zero() -> None:
    before = {"a": torch.zeros(10), "b": torch.tensor([torch.inf, torch.nan, 1.0, 2.0])}
    defense = GradientCompression(rate=0.5)
    after, stats = defense.defend_update({"a": before["a"]}, generator=seeded())
    assert not after["a"].any()
    assert float(stats["kept_energy"]) == 1
    mixed = defense.defend_update({"b": before["b"]}, generator=seeded())[0]["b"]
    assert mixed[2:].tolist() == [0.0, 0.0]
    dropped = GradientCompression(rate=1.0).defend_update(before, generator=seeded())[0]
    assert not any(value.any() for value in dropped.values())


def test_the_kept_energy_is_the_best_of_all_choices_of_so_many_entries() -> None:
    """What top-k means: no other k entries hold more of the squared length."""
    before = update()
    kept = defended("top_k(k=7)", before)
    _, stats = TopK(k=7).defend_update(before, generator=seeded())
    squares = flat(before).square()
    assert int((flat(kept) != 0).sum()) == 7
    assert float(flat(kept).square().sum()) == pytest.approx(float(squares.topk(7).values.sum()))
    expected = float(squares.topk(7).values.sum() / squares.sum())
    assert float(stats["kept_energy"]) == pytest.approx(expected)
    assert float(stats["kept_share"]) == pytest.approx(7 / len(squares))


def test_a_share_keeps_at_least_one_entry_and_k_at_most_all() -> None:
    entries = flat(update()).numel()
    assert int((flat(defended("top_k(share=1e-9)", update())) != 0).sum()) == 1
    assert int((flat(defended("top_k(share=0.25)", update())) != 0).sum()) == round(entries / 4)
    assert torch.equal(flat(defended("top_k(k=9999)", update())), flat(update()))
    count = entries - round(0.9 * entries)
    same = defended("gradient_compression(rate=0.9)", update())
    assert torch.equal(flat(defended(f"top_k(k={count})", update())), flat(same))


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_noise_is_laplacian_with_the_scale_as_b(scale: float) -> None:
    """Mean 0, E|x| = b, variance 2 b^2, fourth moment 24 b^4, and P(|x| > t) = exp(-t / b)."""
    zero = {"w": torch.zeros(400, 500)}
    noise = flat(LaplaceNoise(scale=scale).defend_update(zero, generator=seeded())[0]).double()
    n, x = len(noise), noise / scale
    assert abs(float(x.mean())) < 5 * math.sqrt(2 / n)
    assert abs(float(x.abs().mean()) - 1) < 5 / math.sqrt(n)
    assert abs(float(x.square().mean()) - 2) < 5 * math.sqrt((24 - 4) / n)
    for t in (0.5, 1.0, 3.0):
        p = math.exp(-t)
        assert abs(float((x.abs() > t).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_laplacian_noise_states_its_expected_norm_and_keeps_types() -> None:
    given_update = {"a": torch.ones(300, dtype=torch.float64), "b": torch.ones(4).half()}
    out, stats = LaplaceNoise(scale=0.5).defend_update(given_update, generator=seeded())
    assert [value.dtype for value in out.values()] == [torch.float64, torch.float16]
    assert float(stats["expected_noise_norm"]) == pytest.approx(0.5 * math.sqrt(2 * 304))
    again, _ = LaplaceNoise(scale=0.5).defend_update(given_update, generator=seeded())
    assert torch.equal(flat(again), flat(out))


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
def test_clipping_shortens_to_the_bound_and_keeps_the_direction(bound: float) -> None:
    before = update()
    after, stats = UpdateClipping(max_norm=bound).defend_update(before, generator=seeded())
    length = float(flat(before).norm())
    assert float(stats["update_norm"]) == pytest.approx(length)
    assert float(stats["clipped"]) == (length > bound)
    assert float(flat(after).norm()) == pytest.approx(min(length, bound))
    cosine = torch.nn.functional.cosine_similarity(flat(before), flat(after), dim=0)
    assert float(cosine) == pytest.approx(1)
    if length <= bound:
        assert torch.equal(flat(after), flat(before))


def test_the_length_of_half_precision_updates_does_not_overflow() -> None:
    before = {"a": torch.full((100,), 300.0).half()}
    after, _ = UpdateClipping(max_norm=1.0).defend_update(before, generator=seeded())
    assert float(flat(after).float().norm()) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize(
    ("layers", "hidden"),
    [
        ("('a',)", {"a.weight", "a.bias"}),
        ("('a.bias',)", {"a.bias"}),
        ("('b', 'scale')", {"b.weight", "scale"}),
    ],
)
def test_withheld_layers_are_zero_and_the_others_untouched(layers: str, hidden: set[str]) -> None:
    before = update()
    after = defended(f"withhold(layers={layers})", before)
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, torch.zeros_like(value) if name in hidden else before[name])
    _, stats = create("defenses", f"withhold(layers={layers})").defend_update(
        before, generator=seeded()
    )
    entries = sum(before[name].numel() for name in hidden)
    assert float(stats["withheld_share"]) == pytest.approx(entries / flat(before).numel())


@pytest.mark.parametrize("layer", ["c", "a.wei", "", "weight"])
def test_an_unknown_layer_lists_those_there_are(layer: str) -> None:
    with pytest.raises(ComponentError, match=r"expected some of a, a\.weight, a\.bias, b, b\.w"):
        Withhold(layers=("a", layer)).defend_update(update(), generator=seeded())


@pytest.mark.parametrize(
    "spec",
    [
        "gradient_compression(rate=0.5)",
        "top_k(k=9)",
        "update_clipping(max_norm=1.0)",
        "withhold(layers=('b',))",
        "laplace_noise(scale=0.1)",
    ],
)
def test_update_defenses_are_twice_differentiable(spec: str) -> None:
    names, values = zip(*update().items(), strict=True)
    inputs = [value.requires_grad_(True) for value in values]

    def squared(*xs: Tensor) -> Tensor:
        return flat(defended(spec, dict(zip(names, xs, strict=True)))) ** 2

    assert torch.autograd.gradcheck(squared, inputs)
    assert torch.autograd.gradgradcheck(squared, inputs)


@pytest.mark.parametrize("spec", [s for s in SPECS if "noise" not in s and "each" not in s])
def test_they_run_inside_vmap(spec: str) -> None:
    rows = torch.randn(4, 40, generator=seeded(1))

    def of(row: Tensor) -> Tensor:
        return flat(defended(spec, {"1.weight": row[:30].view(5, 6), "b": row[30:]}))

    torch.testing.assert_close(vmap(of)(rows), torch.stack([of(row) for row in rows]))


def step(model: nn.Module | None = None, n: int = 4) -> Step:
    inputs = torch.rand(n, 1, 9, 9, generator=seeded(1))
    samples = Samples(inputs, torch.arange(n) % 3)
    return step_of(model or network(), TASK, samples, expected_batch_size=n)


def network() -> nn.Module:
    return MLP(hidden=(5,)).build(TASK, seed=0)


def test_the_mean_gradient_is_autograds() -> None:
    of = step()
    loss = of.loss(of.model(of.inputs), of.labels).mean()
    expected = torch.autograd.grad(loss, list(of.model.parameters()))
    for value, other in zip(mean_gradient(of).values(), expected, strict=True):
        torch.testing.assert_close(value, other)
    larger = mean_gradient(replace(of, expected_batch_size=8))
    torch.testing.assert_close(flat(larger), flat(mean_gradient(of)) / 2)


def test_batch_norm_in_train_mode_leaves_the_buffers_of_the_step_alone() -> None:
    of = step(ConvNet64().build(TASK, seed=0))
    before = {name: value.clone() for name, value in of.buffers.items()}
    EachStep(defense="top_k(k=5)").defend_gradient(of, generator=seeded())
    assert all(torch.equal(of.buffers[name], value) for name, value in before.items())


def train(defense: GradientDefense | None, **changes: object) -> dict[str, Tensor]:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = Samples(torch.rand(6, 1, 9, 9, generator=seeded(2)), torch.arange(6) % 3)
    training = LocalTraining(lr=0.25, batch_size=3, order="sequential").model_copy(update=changes)
    result = local_train(
        model,
        TASK,
        samples,
        training,
        generator=seeded(),
        gradient_defense=defense,
        defense_generator=seeded(5),
    )
    return {name: result.state[name] - before[name] for name in before}


@pytest.mark.parametrize(
    "inner", ["gradient_compression(rate=0.7)", "gaussian_noise(scale=0.01)", "top_k(k=9)"]
)
def test_at_one_step_it_is_minus_lr_times_the_defended_gradient(inner: str) -> None:
    """With noise of the same draws: scales are in gradient units."""
    plain = {name: value / -0.25 for name, value in train(None).items()}
    of_gradient, _ = create("defenses", inner).defend_update(plain, generator=seeded(5))
    step_wise = train(EachStep(defense=inner))
    torch.testing.assert_close(flat(step_wise), -0.25 * flat(of_gradient), rtol=0, atol=1e-6)


def test_over_several_steps_every_step_is_defended() -> None:
    """Two steps that keep 3 entries each change at most 6, and not what one mask would."""
    change = train(EachStep(defense="top_k(k=3)"), algorithm="fedavg")
    assert 3 <= int((flat(change) != 0).sum()) <= 6
    bounded = train(EachStep(defense="update_clipping(max_norm=0.01)"), algorithm="fedavg")
    assert float(flat(bounded).norm()) <= 2 * 0.25 * 0.01 * (1 + 1e-4)


def test_several_defenses_run_in_their_order() -> None:
    first = EachStep(defense="update_clipping(max_norm=1e-3)+top_k(k=2)")
    gradient, stats = first.defend_gradient(step(), generator=seeded())
    assert int((flat(gradient) != 0).sum()) == 2
    assert set(stats) == {
        "UpdateClipping/update_norm",
        "UpdateClipping/clipped",
        "TopK/kept_share",
        "TopK/kept_energy",
    }


def test_it_is_a_gradient_defense_that_adversaries_can_differentiate_in_batches() -> None:
    defense = EachStep(defense="gradient_compression(rate=0.5)")
    assert isinstance(defense, GradientDefense)
    assert not isinstance(defense, UpdateDefense)
    model, labels = network(), torch.arange(2)

    def objective(x: Tensor) -> Tensor:
        of = step_of(model, TASK, Samples(x, labels), expected_batch_size=2)
        gradient, _ = defense.defend_gradient(of, generator=seeded())
        return flat(gradient).square().sum()

    targets = torch.rand(3, 2, 1, 9, 9, generator=seeded(4))
    alone = torch.stack([grad(objective)(x) for x in targets])
    torch.testing.assert_close(vmap(grad(objective))(targets), alone)


def test_it_joins_update_defenses_in_one_setting() -> None:
    spec = "each_step(defense='top_k(k=5)+gaussian_noise(scale=0.1)')+update_clipping(max_norm=1.0)"
    gradient, updates = split_defenses(create_all("defenses", spec))
    assert gradient == EachStep(defense="top_k(k=5)+gaussian_noise(scale=0.1)")
    assert updates == (UpdateClipping(max_norm=1.0),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("each_step", "defense is required"),
        ("each_step(defense='')", "expected update defenses joined by .* got none"),
        ("each_step(defense='per_sample_clipping(max_norm=1.0)')", "got per_sample_clipping"),
        ("each_step(defense=\"each_step(defense='top_k(k=1)')\")", "got each_step"),
        ("each_step(defense='top_k(k=0)')", "top_k: k: .* greater than or equal to 1"),
        ("each_step(defense='nope')", "no defense 'nope'"),
        ("top_k", "either k, a number of entries, or share"),
        ("top_k(k=1, share=0.5)", "either k"),
        ("top_k(share=0)", "greater than 0"),
        ("gradient_compression(rate=1.01)", "less than or equal to 1"),
        ("gradient_compression(per='layer')", "'model' or 'tensor'"),
        ("laplace_noise(scale=-1)", "greater than or equal to 0"),
        ("update_clipping(max_norm=0)", "greater than 0"),
        ("withhold(layers=())", "at least 1"),
        ("withhold", "layers is required"),
    ],
)
def test_senseless_settings_are_refused_when_it_is_made(spec: str, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        create("defenses", spec)


def test_one_layer_to_withhold_needs_no_list() -> None:
    assert create("defenses", "withhold(layers='b')") == Withhold(layers=("b",))
    with pytest.raises(ComponentError, match=r"no parameter 'nope'"):
        create("defenses", "withhold(layers='nope')").defend_update(update(), generator=seeded())

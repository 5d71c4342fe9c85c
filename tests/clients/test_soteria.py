"""Soteria: masks, slopes and defended gradients against loops, closed forms and hand-made masks."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from clients.defending import step_of
from clients.defenses.soteria import Soteria, kept
from clients.defenses.soteria_layer import DenseLayer, features_of, find_layer
from clients.defenses.soteria_scores import batch_costs, costs, exact_norms, shrunk, sketched_norms
from clients.defenses.windowed_convolution import transposed
from clients.training import local_train
from fl_privacy.component import ComponentError, create
from fl_privacy.models.building import initialization
from fl_privacy.models.das import DasFashionNet
from fl_privacy.models.mlp import MLP
from fl_privacy.models.soteria import ConvNet64
from fl_privacy.models.zhu import LeNetZhu
from fl_privacy.testing import check_defense
from fl_privacy.types import LocalTraining, Samples, Step, Task

TASK = Task(input_shape=(2, 11, 10), classes=3, mean=(0.4, 0.5), std=(0.3, 0.2))
LABELS = torch.tensor([0, 2, 1, 1, 0])


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def small() -> nn.Module:
    """Convolutions of several kinds, batch norm, max-pool, two dense layers with ReLU."""
    with initialization(0):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=(2, 0), dilation=(2, 1), bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3, stride=2, padding=1),
            nn.Conv2d(6, 8, 2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 12),
            nn.ReLU(),
            nn.Linear(12, 3),
        )
        for name, buffer in model.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.copy_(torch.rand(4) + 0.5)
    return model.double()


def step(model: nn.Module | None = None, images: int = 5, *, training: bool = False) -> Step:
    model = (model or small()).train(training)
    inputs = torch.rand(images, *TASK.input_shape, generator=seeded(1), dtype=torch.float64)
    samples = Samples(inputs, LABELS[:images])
    return step_of(model, TASK, samples, expected_batch_size=images)


def layer_and_values(of: Step, name: str = "") -> tuple[DenseLayer, Tensor]:
    layer = find_layer(of, name)
    return layer, features_of(of, layer)(of.inputs)


def slopes(of: Step, name: str = "", *, whole_batch: bool = False) -> Tensor:
    """The plain loop: one autograd backward pass a feature, ``[n, d, inputs]``."""
    features = features_of(of, find_layer(of, name))
    rows = []
    for i in range(len(of.inputs)):
        x = (of.inputs if whole_batch else of.inputs[i : i + 1]).clone().requires_grad_(True)
        values = features(x)[i if whole_batch else 0]
        found = [torch.autograd.grad(v, x, retain_graph=True)[0].flatten() for v in values]
        rows.append(torch.stack(found))
    return torch.stack(rows)


def loop_mask(values: list[float], norms: list[float], rate: float) -> list[bool]:
    """Algorithm 1 as it is written, among active features: which features stay."""
    active = [j for j, value in enumerate(values) if value != 0]
    ranked = sorted(active, key=lambda j: -abs(values[j]) / norms[j])
    pruned = ranked[: round(rate * len(active))]
    return [j not in pruned for j in range(len(values))]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layer", ["10", "12"])
def test_masks_are_those_of_a_plain_loop(layer: str, rate: float) -> None:
    of = step()
    found, values = layer_and_values(of, layer)
    norms = slopes(of, layer).norm(dim=2)
    keep, active = Soteria(layer=layer, rate=rate).choose(of, found, seeded())
    expected = [loop_mask(v.tolist(), s.tolist(), rate) for v, s in zip(values, norms, strict=True)]
    assert keep.tolist() == expected
    assert 0 < int((active & ~keep).sum()) < active.numel() or rate == 0
    assert bool((values == 0).any())


@pytest.mark.parametrize(("norm", "dual"), [(2, 2.0), (1, math.inf), ("inf", 1.0)])
@pytest.mark.parametrize("lanes", [1, 5, 1000])
def test_exact_slopes_are_norms_of_the_full_jacobian(
    norm: Literal[1, 2, "inf"], dual: float, lanes: int
) -> None:
    of = step()
    layer, values = layer_and_values(of)
    features = features_of(of, layer)
    jacobian = torch.stack([jacrev(features)(x[None])[0].flatten(1) for x in of.inputs])
    expected = torch.linalg.vector_norm(jacobian, ord=dual, dim=2) * (values != 0)
    found = exact_norms(features, of.inputs, dual=dual, lanes=lanes)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    chosen = Soteria(norm=norm).norms(of, layer, seeded())
    torch.testing.assert_close(chosen, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(9, 12), (10, 12)])
@pytest.mark.parametrize(("padding", "dilation"), [((0, 0), (1, 1)), ((1, 2), (1, 2))])
def test_a_windowed_convolution_has_the_slopes_of_the_whole_one(
    share: float,
    channels: int,
    size: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    weight = torch.randn(4, channels, 3, 2, generator=seeded(), dtype=torch.float64)
    inputs = torch.zeros(60, channels, *size, dtype=torch.float64)
    shape = F.conv2d(inputs, weight, None, 1, padding, dilation).shape
    slope = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
    boxes = torch.zeros(shape, dtype=torch.bool)  # each of its own place and size, borders too
    for box, start in zip(boxes, torch.rand(60, 2, generator=seeded(2)), strict=True):
        top, left = (start * torch.tensor(shape[2:])).int().tolist()
        tall, wide = (math.ceil(share * length) for length in shape[2:])
        box[:, top : top + tall, left : left + wide] = True
    slope = slope * boxes
    found = transposed(slope, weight, padding, dilation)
    expected = conv2d_input(inputs.shape, weight, slope, 1, padding, dilation)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Functional(nn.Module):
    """Convolutions with settings as PyTorch's functions take them, and one image at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3, generator=seeded(), dtype=torch.float64))
        self.fc = nn.Linear(2 * 11 * 10, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, 1, 1, 1, 1).relu()
        x = F.conv2d(x, self.weight, None, [1], [1], [1], 1).relu()
        x = torch.stack([F.conv2d(one, self.weight, None, 1, 1, 1, 1) for one in x])
        return self.fc(F.conv2d(x, self.weight, padding=1).relu().flatten(1))  # type: ignore[no-any-return]


def test_exact_slopes_of_functions_are_those_of_a_loop() -> None:
    of = step(Functional(), images=2)
    layer, values = layer_and_values(of)
    found = exact_norms(features_of(of, layer), of.inputs)
    torch.testing.assert_close(found, slopes(of).norm(dim=2) * (values != 0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("p", "dual"), [(2.0, 2.0), (1.0, math.inf), (math.inf, 1.0)])
def test_a_cost_is_the_shortest_way_to_zero(p: float, dual: float) -> None:
    slope = torch.randn(50, generator=seeded(), dtype=torch.float64)
    value = torch.tensor([[1.7]], dtype=torch.float64)
    cost = float(costs(value, torch.linalg.vector_norm(slope, ord=dual).view(1, 1)))
    moves = torch.randn(2000, 50, generator=seeded(1), dtype=torch.float64)
    moves = moves * (-1.7 / (moves @ slope))[:, None]  # each moves the value to zero
    assert float(torch.linalg.vector_norm(moves, ord=p, dim=1).min()) >= cost
    one = F.one_hot(slope.abs().argmax(), 50) * slope.sign()
    best = {2.0: slope, 1.0: one, math.inf: slope.sign()}[p]
    best = best * (-1.7 / (best @ slope))
    assert float(torch.linalg.vector_norm(best, ord=p)) == pytest.approx(cost, rel=1e-12)


def test_slopes_are_those_of_the_whole_batch_where_batch_norm_mixes_it() -> None:
    of = step(images=3, training=True)
    layer, values = layer_and_values(of)
    norms = slopes(of, whole_batch=True).norm(dim=2)
    found = Soteria().norms(of, layer, seeded())
    torch.testing.assert_close(found, norms * (values != 0), rtol=1e-9, atol=1e-12)
    alone = exact_norms(features_of(of, layer), of.inputs)
    assert not torch.allclose(alone, found)
    sketch = sketched_norms(
        features_of(of, layer), of.inputs, probes=2000, generator=seeded(), mixing=True, lanes=3000
    )
    torch.testing.assert_close(sketch, norms * (values != 0), rtol=0.1, atol=1e-12)


def test_a_step_leaves_the_model_and_its_statistics_alone() -> None:
    of = step(training=True)
    before = {name: value.clone() for name, value in of.model.state_dict().items()}
    buffers = {name: value.clone() for name, value in of.buffers.items()}
    for scores in ("exact", "sketch"):
        create("defenses", f"soteria(scores={scores!r})").defend_gradient(of, generator=seeded())
    assert all(torch.equal(v, before[name]) for name, v in of.model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in of.buffers.items())
    assert all(parameter.grad is None for parameter in of.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in of.model.modules())


def test_the_defended_gradient_is_the_papers_formula_on_a_hand_made_network() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    w1 = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0], [0.0, -1.0, 0.0]])
    w2 = torch.tensor([[1.0, -1.0, 0.5], [2.0, 0.0, 1.0]])
    for module, weight in ((model[0], w1), (model[2], w2)):
        assert isinstance(module, nn.Linear)
        module.weight.data, module.bias.data = weight, torch.zeros(len(weight))
    task = Task(input_shape=(3,), classes=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    x, y = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.5, 0.0]]), torch.tensor([0, 1])
    of = step_of(model, task, Samples(x, y), expected_batch_size=2)
    # r = (5, 7, 0) and (3, 1.5, 0); slopes have norms 3 and 5: costs 5/3, 7/5 and 1, 3/10
    r = torch.tensor([[5.0, 7.0, 0.0], [3.0, 1.5, 0.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    delta = (r @ w2.T).softmax(1) - F.one_hot(y, 2)
    gradient, stats = Soteria(layer="2", rate=0.5).defend_gradient(of, generator=seeded())
    expected = sum(torch.outer(delta[i], r[i] * mask[i]) for i in range(2)) / 2
    torch.testing.assert_close(gradient["2.weight"], expected)
    torch.testing.assert_close(gradient["2.bias"], delta.mean(0))
    assert torch.equal(gradient["2.weight"][:, 0], torch.zeros(2))
    assert float(stats["pruned_share"]) == pytest.approx(1 / 3)
    assert float(stats["effective_rate"]) == pytest.approx(1 / 2)
    assert float(stats["active_share"]) == pytest.approx(2 / 3)
    removed = sum(torch.outer(delta[i], r[i] * (1 - mask[i])) for i in range(2)) / 2
    assert float(stats["removed_norm"]) == pytest.approx(float(torch.as_tensor(removed).norm()))


def test_where_features_are_the_inputs_the_largest_are_pruned() -> None:
    of = step(MLP(hidden=()).build(TASK, seed=0).double())
    layer, values = layer_and_values(of)
    keep, _ = Soteria(rate=0.25).choose(of, layer, seeded())
    assert torch.equal(values, of.inputs.flatten(1))
    for row, mask in zip(values.abs(), keep, strict=True):
        assert float(row[~mask].min()) >= float(row[mask].max())
        assert int((~mask).sum()) == 55


def by_samples(of: Step, defense: Soteria) -> dict[str, Tensor]:
    """Each sample defended alone, and the average."""
    alone = [
        replace(of, inputs=x[None], labels=y[None], expected_batch_size=1)
        for x, y in zip(of.inputs, of.labels, strict=True)
    ]
    gradients = [defense.defend_gradient(one, generator=seeded())[0] for one in alone]
    return {n: torch.stack([g[n] for g in gradients]).mean(0) for n in gradients[0]}


def by_hand(of: Step, keep: Tensor) -> dict[str, Tensor]:
    """Autograd on a layer whose weight sees masked features and whose output does not."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear)
        free = F.linear(given[0], module.weight.detach(), module.bias)
        pruned = F.linear(given[0].detach() * keep, module.weight)
        return free + pruned - pruned.detach()

    handle = of.model.get_submodule("10").register_forward_hook(hook)
    loss = of.loss(of.model(of.inputs), of.labels).mean()
    handle.remove()
    names, parameters = zip(*of.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("scores", ["exact", "sketch"])
def test_three_ways_to_the_defended_gradient_agree(scores: Literal["exact", "sketch"]) -> None:
    of, defense = step(), Soteria(scores=scores)
    keep, _ = defense.choose(of, find_layer(of, ""), seeded())
    batch, _ = defense.defend_gradient(of, generator=seeded())
    for other in (by_samples(of, defense), by_hand(of, keep)):
        for name, value in batch.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-6)
    plain = by_hand(of, torch.ones_like(keep))
    for name, value in batch.items():
        same = torch.allclose(value, plain[name], rtol=0, atol=1e-12)
        assert same == (name != "10.weight")


def test_a_batch_of_dead_features_is_left_as_it_is() -> None:
    model = small()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 2:
            assert module.bias is not None
            nn.init.constant_(module.bias, -100.0)
    of = step(model)
    assert int(layer_and_values(of)[1].count_nonzero()) == 0
    for masks in ("sample", "batch"):
        spec = f"soteria(masks={masks!r}, rate=1.0)"
        gradient, stats = create("defenses", spec).defend_gradient(of, generator=seeded())
        plain = by_hand(of, torch.ones(5, 16))
        for name, value in gradient.items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-12)
        assert {name: float(value) for name, value in stats.items()} == dict.fromkeys(stats, 0.0)


def test_a_rate_of_all_spends_itself_on_dead_features_first() -> None:
    active = torch.tensor([[False] * 4 + [True] * 6])
    cost = torch.arange(10.0)[None]
    for rate, pruned in ((0.0, 0), (0.3, 0), (0.4, 0), (0.5, 1), (0.8, 4), (1.0, 6)):
        keep = kept(cost, active, rate, of="all")
        assert int((active & ~keep).sum()) == pruned
        assert (~keep)[0].nonzero().flatten().tolist() == list(range(10 - pruned, 10))


def test_one_mask_a_batch_adds_the_ratios_of_slope_to_feature() -> None:
    of = step()
    layer, values = layer_and_values(of)
    norms = slopes(of).norm(dim=2)
    sums = [
        sum(float(s) / abs(float(v)) for s, v in zip(norms[:, j], values[:, j], strict=True) if v)
        for j in range(values.shape[1])
    ]
    alive = [j for j, total in enumerate(sums) if total > 0]
    pruned = sorted(alive, key=lambda j: sums[j])[: round(0.4 * len(alive))]
    keep, _ = Soteria(masks="batch").choose(of, layer, seeded())
    assert keep.tolist() == [[j not in pruned for j in range(len(sums))]] * len(values)
    gradient, _ = Soteria(masks="batch").defend_gradient(of, generator=seeded())
    assert int(gradient["10.weight"][:, pruned].count_nonzero()) == 0


def test_one_image_has_one_mask_either_way() -> None:
    of = step(images=1)
    layer = find_layer(of, "")
    masks = [Soteria(masks=m).choose(of, layer, seeded())[0] for m in ("sample", "batch")]
    assert torch.equal(*masks)


def test_an_active_feature_without_slope_goes_first_and_a_dead_one_never() -> None:
    features, norms = torch.tensor([[0.0, 2.0, 3.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert costs(features, norms).tolist() == [[0.0, math.inf, 3.0, 0.0]]
    assert batch_costs(features, norms)[0, :3].tolist() == [math.inf, math.inf, 3.0]
    keep = kept(costs(features, norms), features != 0, 0.5, of="active")
    assert keep.tolist() == [[True, False, True, True]]


def squares(probes: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Sketched squares over true ones, ``[repeats, active features]``, each with its own probes."""
    of = step(images=1)
    layer, values = layer_and_values(of)
    truth = slopes(of).norm(dim=2)
    features = features_of(of, layer)
    found = [
        sketched_norms(features, of.inputs, probes=probes, generator=seeded(i)).square()
        for i in range(repeats)
    ]
    ratios = torch.cat(found) / truth.square()
    return ratios[:, values[0] != 0], truth


def test_the_sketch_is_unbiased_with_the_variance_of_its_probes() -> None:
    probes, repeats = 4, 400
    ratios, _ = squares(probes, repeats)
    deviation = math.sqrt(2 / probes)
    assert float((ratios.mean(0) - 1).abs().max()) < 5 * deviation / math.sqrt(repeats)
    # the fourth moment of a chi-square over k: var of the sample variance
    kurtosis = 3 + 12 / probes
    error = 5 * deviation**2 * math.sqrt((kurtosis - 1) / repeats)
    assert float((ratios.var(0) - deviation**2).abs().max()) < error


def test_the_sketch_converges_to_the_exact_masks() -> None:
    of = step()
    layer = find_layer(of, "")
    exact, active = Soteria().choose(of, layer, seeded())
    shares = []
    for probes in (1, 16, 4096):
        keep, _ = Soteria(scores="sketch", probes=probes).choose(of, layer, seeded())
        shares.append(float((~keep & ~exact).sum() / (active & ~exact).sum()))
    assert shares[0] < shares[2] == 1


def test_a_sketch_does_not_depend_on_mates_or_lanes() -> None:
    of = step()
    features = features_of(of, find_layer(of, ""))

    def found(inputs: Tensor, lanes: int) -> Tensor:
        return sketched_norms(features, inputs, probes=6, generator=seeded(), lanes=lanes)

    whole = found(of.inputs, 1000)
    alone = torch.cat([found(x[None], 1) for x in of.inputs])
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=0)


def test_shrinking_takes_out_what_is_noise() -> None:
    truth = (0.2 * torch.randn(40, 600, generator=seeded(), dtype=torch.float64)).exp()
    probes = 8
    drawn = torch.randn(probes, 40, 600, generator=seeded(1), dtype=torch.float64)
    noisy = truth * drawn.square().mean(0).sqrt()
    active = torch.rand(40, 600, generator=seeded(2)) < 0.5
    better = shrunk(noisy.where(active, 0), active, probes)
    assert torch.equal(better != 0, active)

    def error(of: Tensor) -> float:
        return float((of.log() - truth.log())[active].square().mean())

    noise = float(torch.polygamma(1, torch.tensor(probes / 2.0))) / 4
    assert error(better) == pytest.approx(noise * 0.04 / (noise + 0.04), rel=0.05)
    assert error(noisy) > 1.5 * error(better)
    assert torch.allclose(shrunk(truth, truth > 0, 10**6), truth, rtol=1e-3)


def test_bfloat16_slopes_are_near_the_full_ones() -> None:
    of = step()
    layer, values = layer_and_values(of)
    full, short = (
        Soteria(scores="sketch", precision=p).norms(of, layer, seeded())
        for p in ("full", "bfloat16")
    )
    assert short.dtype == full.dtype
    active = values != 0
    assert float(((short - full).abs() / full)[active].median()) < 0.02


@pytest.mark.parametrize("name", ["fc", "0", "9"])
def test_a_layer_that_does_not_exist_or_is_not_dense_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"nn.Linear.*'{name}'; layers that do: 10, 12$"):
        Soteria(layer=name).defend_gradient(step(), generator=seeded())


def test_layers_that_see_more_than_one_vector_a_sample_are_passed_over() -> None:
    task = Task(input_shape=(4, 6), classes=3, mean=(0.0,) * 4, std=(1.0,) * 4)
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(20, 3))
    samples = Samples(torch.rand(2, 4, 6, generator=seeded()), LABELS[:2])
    of = step_of(model, task, samples, expected_batch_size=2)
    assert find_layer(of, "").name == "2"
    with pytest.raises(ValueError, match="layers that do: 2"):
        find_layer(of, "0")
    of = replace(of, model=nn.Flatten(), parameters={}, buffers={})
    with pytest.raises(ValueError, match="layers that do: none"):
        find_layer(of, "")


def shared() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(220, 220), nn.Linear(220, 220), nn.Linear(220, 3))
    model[2].weight = model[1].weight
    return model.double()


def computed() -> nn.Module:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(220, 3))
    return nn.Sequential(nn.Flatten(), linear).double()


@pytest.mark.parametrize(("model", "name"), [(shared(), "1"), (shared(), "2"), (computed(), "1")])
def test_a_weight_that_is_not_the_layers_own_is_refused(model: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}\.weight to be a trained parameter of that"):
        find_layer(step(model), name)
    assert find_layer(step(shared()), "3").name == "3"


def test_dropout_before_the_layer_is_refused_and_after_it_is_not() -> None:
    task = Task(input_shape=(1, 4, 4), classes=3, mean=(0.0,), std=(1.0,))
    model = DasFashionNet(hidden=(6, 5)).build(task, seed=0).train()
    samples = Samples(torch.rand(2, 1, 4, 4, generator=seeded()), LABELS[:2])
    of = step_of(model, task, samples, expected_batch_size=2)
    with pytest.raises(ValueError, match=r"classifier .*dropout: set dropout=0"):
        Soteria(layer="classifier").defend_gradient(of, generator=seeded())
    Soteria(layer="dense2").defend_gradient(of, generator=seeded())


@pytest.mark.parametrize(
    "settings",
    [
        "rate=-0.1",
        "rate=1.5",
        "rate=True, of='some'",
        "norm=3",
        "scores='sketch', norm=1",
        "scores='sketch', probes=0",
        "shrink=True",
        "precision='bfloat16'",
    ],
)
def test_senseless_settings_are_refused(settings: str) -> None:
    with pytest.raises(ComponentError, match="soteria"):
        create("defenses", f"soteria({settings})")


@pytest.mark.parametrize(
    "settings", [{}, {"norm": "inf"}, {"masks": "batch"}, {"scores": "sketch", "shrink": True}]
)
def test_soteria_conforms(settings: dict[str, Any]) -> None:
    check_defense(Soteria(**settings))


def test_a_defended_gradient_is_twice_differentiable_for_its_masks() -> None:
    model = LeNetZhu().build(Task(**{**TASK.model_dump(), "input_shape": (2, 4, 4)}), seed=0)
    inputs = torch.rand(1, 2, 4, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    of = Step(**{**vars(step(model.double())), "labels": LABELS[:1], "expected_batch_size": 1})

    def defended(x: Tensor) -> Tensor:
        gradient, _ = Soteria().defend_gradient(replace(of, inputs=x), generator=seeded())
        return gradient["classifier.weight"].flatten()[:24]

    assert torch.autograd.gradcheck(defended, (inputs,))
    assert torch.autograd.gradgradcheck(defended, (inputs,))


@pytest.mark.parametrize("settings", [{}, {"masks": "batch"}, {"scores": "sketch", "probes": 4}])
def test_an_adversary_can_run_soteria_inside_vmap_and_grad(settings: dict[str, Any]) -> None:
    of, defense = step(images=2), Soteria(**settings)

    def objective(x: Tensor) -> Tensor:
        gradient, _ = defense.defend_gradient(replace(of, inputs=x), generator=seeded())
        return torch.stack([value.square().sum() for value in gradient.values()]).sum()

    targets = torch.rand(3, *of.inputs.shape, generator=seeded(2), dtype=torch.float64)
    batched = vmap(grad(objective))(targets)
    alone = torch.stack([grad(objective)(x) for x in targets])
    torch.testing.assert_close(batched, alone)
    x = targets[0].clone().requires_grad_(True)
    (outside,) = torch.autograd.grad(objective(x), x)  # here dead features are skipped
    torch.testing.assert_close(outside, alone[0])


def test_a_client_trains_with_it() -> None:
    task = Task(input_shape=(1, 9, 9), classes=3, mean=(0.0,), std=(1.0,))
    samples = Samples(torch.rand(4, 1, 9, 9, generator=seeded()), LABELS[:4])
    training = LocalTraining(lr=0.1, batch_size=2, algorithm="fedavg", batch_norm="train")
    defense = create("defenses", "soteria(scores='sketch', probes=2)")

    def trained(defense: Soteria | None) -> tuple[nn.Module, dict[str, float]]:
        model = ConvNet64().build(task, seed=0)
        result = local_train(
            model,
            task,
            samples,
            training,
            generator=seeded(),
            gradient_defense=defense,
            defense_generator=seeded(1),
        )
        return model, result.stats

    model, stats = trained(defense)
    other, _ = trained(None)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)  # type: ignore[union-attr, arg-type]
    assert stats["effective_rate"] == pytest.approx(0.4, abs=0.01)
    assert 0 < stats["pruned_share"] < stats["active_share"] <= 1
    assert stats["removed_norm"] > 0

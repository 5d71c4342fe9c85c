"""Certified Lipschitz constants: exact where theory says so, and no pair of inputs above them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_privacy.certificates import (
    certified_bound,
    features_of,
    first_order_estimate,
    jacobian_norm,
    pruned_representation_value,
)
from fl_privacy.component import create
from fl_privacy.feature_chain import ChainError, Piece, feature_chain
from fl_privacy.lipschitz import (
    ACTIVATIONS,
    LINEAR,
    LipschitzError,
    constant,
    lipschitz_merged,
    lipschitz_product,
    matrix_of,
)
from fl_privacy.local_lipschitz import (
    Neighborhood,
    certified_distance,
    local_lipschitz,
    neighborhood,
    stages_at,
)
from fl_privacy.operator_norms import convolution_norm, max_pool_norm
from fl_privacy.seeding import generator
from fl_privacy.types import Task

NAMES = ("lenet-zhu", "mlp(hidden=(24, 16))", "convnet64")
TASK = Task(input_shape=(3, 9, 9), classes=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module", params=NAMES)
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A network in eval mode; running statistics and scales of batch norm are random."""
    model: nn.Module = create("models", request.param).build(TASK, seed=0).eval()
    draw = generator("statistics")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=draw))
            for values in (module.running_var, module.weight.data):
                values.copy_(torch.rand(len(values), generator=draw) + 0.1)
    return model


@pytest.fixture(scope="module")
def merged(network: nn.Module) -> float:
    """The merged constant, which costs some time."""
    return lipschitz_merged(network, "classifier", TASK)


def true_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    """By the SVD of the matrix of an affine layer."""
    matrix = matrix_of([Piece("layer", module, shape)])
    return float(torch.linalg.svdvals(matrix)[0])


def dense(*rows: tuple[float, ...], bias: float = 0.0) -> nn.Linear:
    """A dense layer with the weights of ``rows``."""
    layer = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
        layer.bias.fill_(bias)
    return layer


def image(*parts: int | str) -> Tensor:
    return torch.rand(TASK.input_shape, generator=generator("image", *parts))


@pytest.mark.parametrize("dense_up_to", [0, 1024])
def test_merging_never_raises_the_constant(dense_up_to: int) -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.Sigmoid(),
        nn.Conv2d(6, 4, 2, stride=2), nn.Dropout(), nn.Flatten(), nn.Linear(4, 5),
        nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4),
    ).eval()  # fmt: skip
    for module in layers.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.uniform_(0.2, 2, generator=generator("variance"))
    models = {"10": layers, "classifier": create("models", "lenet-zhu").build(TASK, seed=0)}
    for name, model in models.items():
        product = lipschitz_product(model, name, TASK)
        merged = lipschitz_merged(model, name, TASK, dense=dense_up_to)
        assert 0 < merged < product
        chain = feature_chain(model, name, TASK)
        x, y = image(), image("other")
        features = features_of(model, name, TASK)
        assert float((features(x) - features(y)).detach().norm()) <= merged * float((x - y).norm())
        assert math.prod(map(constant, chain)) == product


def test_no_pair_of_random_images_exceeds_the_constant(network: nn.Module, merged: float) -> None:
    features = features_of(network, "classifier", TASK)
    for i in range(20):
        x = image(i)
        for y in (image(i, "far"), x + 1e-3 * torch.randn(x.shape, generator=generator(i))):
            bound = certified_bound(features(x).detach(), features(y).detach(), merged)
            assert 0 < bound <= float((x - y).norm())


def test_no_image_optimized_to_break_the_bound_does(network: nn.Module, merged: float) -> None:
    """Minimize ||X - X'|| Lip / ||r - f(X')||, which the theorem keeps at 1 or above."""
    features, x = features_of(network, "classifier", TASK), image()
    r = features(x).detach()
    other = (x + 0.05 * torch.randn(x.shape, generator=generator("start"))).requires_grad_()
    optimizer = torch.optim.Adam([other], lr=0.01)
    ratios = []
    for _ in range(40):
        optimizer.zero_grad()
        ratio = (x - other).norm() * merged / (r - features(other)).norm()
        ratio.log().backward()
        optimizer.step()
        ratios.append(float(ratio.detach()))
    assert min(ratios) >= 1
    assert min(ratios) < 0.9 * ratios[0], "the search has to get somewhere"
    assert jacobian_norm(features, x) <= merged


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "padding": 2, "stride": 2},
        {"kernel_size": 3, "stride": 3, "padding": 4},
        {"kernel_size": (3, 2), "dilation": (2, 1), "stride": (1, 2), "padding": (0, 1)},
        {"kernel_size": 3, "padding": "same", "groups": 2},
        {"kernel_size": 1, "padding": 3},
    ],
)
def test_the_bound_of_a_convolution_is_above_its_true_norm(settings: dict[str, Any]) -> None:
    for seed in range(3):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            layer = nn.Conv2d(2, 4, **settings)
        bound, norm = convolution_norm(layer, (2, 7, 6)), true_norm(layer, (2, 7, 6))
        assert norm <= bound <= 1.5 * norm


@pytest.mark.parametrize("seed", range(4))  # the worst frequency is not always the lowest
@pytest.mark.parametrize("stride", [1, 2])
def test_the_bound_of_a_convolution_is_the_norm_of_the_circular_one(stride: int, seed: int) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        layer = nn.Conv2d(2, 3, 3, padding=1, stride=stride)
    side = 6  # and a grid of 6 + max(2, 2) = 8 points
    circular = nn.Conv2d(2, 3, 3, padding=1, stride=stride, padding_mode="circular")
    circular.load_state_dict(layer.state_dict())
    assert convolution_norm(layer, (2, side, side)) == pytest.approx(
        true_norm(circular, (2, side + 2, side + 2)), rel=1e-8
    )


def test_a_convolution_padded_otherwise_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(162, 4)
    )
    with pytest.raises(LipschitzError, match=r"0 \(Conv2d\).*zeros.*circular"):
        lipschitz_product(model, "2", TASK)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool2d(2), (2, 6, 4)),
        (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (2, 7, 6)),
        (nn.AvgPool2d(3, stride=2, ceil_mode=True), (1, 6, 6)),
        (nn.AvgPool1d(3, stride=1), (2, 8)),
        (nn.AdaptiveAvgPool2d((3, None)), (2, 7, 5)),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
        (nn.AdaptiveAvgPool1d(3), (2, 8)),
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(5, 3), (2, 5)),
        (nn.BatchNorm2d(2).eval(), (2, 3, 3)),
        (nn.Flatten(), (2, 3)),
    ],
)
def test_the_constant_of_a_linear_layer_is_its_norm(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    assert type(layer) in LINEAR
    if isinstance(layer, nn.BatchNorm2d):
        assert layer.running_var is not None
        layer.running_var.copy_(torch.tensor([0.3, 2.0]))
    assert constant(Piece("layer", layer, shape)) == pytest.approx(
        true_norm(layer, shape), rel=1e-8
    )


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_constant_of_an_activation_is_its_largest_slope(kind: type[nn.Module]) -> None:
    z = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    values = kind()(z)
    steepest = float((values.diff() / z.diff()).abs().max())
    assert (
        steepest <= constant(Piece("layer", kind(), (1,))) * (1 + 1e-9) <= 1.001 * steepest + 1e-6
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "shared"), [(2, 2, 1), (3, 3, 1), (3, 2, 4), (3, 1, 9)]
)
def test_a_max_pool_counts_how_many_windows_share_an_input(
    kernel: int, stride: int, shared: int
) -> None:
    layer = nn.MaxPool2d(kernel, stride)
    assert max_pool_norm(layer, (1, 9, 9)) == pytest.approx(shared**0.5)
    spike = torch.zeros(1, 1, 9, 9)
    spike[..., 4, 4] = 1.0  # it reaches the most windows that an input can
    assert float(layer(spike).norm()) == pytest.approx(shared**0.5)


def test_the_bound_is_tight_for_a_linear_extractor() -> None:
    task = Task(input_shape=(1, 2, 2), classes=2, mean=(0.5,), std=(0.25,))
    first = dense((3, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0.5), bias=0.6)
    model = nn.Sequential(nn.Flatten(), first, nn.Linear(3, 2))
    lipschitz = lipschitz_product(model, "2", task)
    assert lipschitz == pytest.approx(3 / 0.25)
    features, x = features_of(model, "2", task), torch.full((1, 2, 2), 0.5)
    y = x + torch.tensor([[[0.1, 0.0], [0.0, 0.0]]])
    assert certified_bound(features(x).detach(), features(y).detach(), lipschitz) == (
        pytest.approx(0.1, rel=1e-5)
    )
    assert jacobian_norm(features, x) == pytest.approx(12, rel=1e-5)
    pruned = features(x).detach() * torch.tensor([0.0, 1.0, 1.0])
    value = pruned_representation_value(features(x).detach(), pruned, lipschitz)
    assert value == first_order_estimate(features(x).detach(), pruned, lipschitz)
    assert value == pytest.approx(0.6 / 12, rel=1e-5)


def test_consecutive_linear_layers_count_as_one() -> None:
    """Two projections whose product is zero: the product of norms is 1, the truth 0."""
    task = Task(input_shape=(2,), classes=2, mean=(0.0, 0.0), std=(1.0, 1.0))
    model = nn.Sequential(dense((1, 0), (0, 0)), dense((0, 0), (0, 1)), nn.ReLU(), nn.Linear(2, 2))
    assert lipschitz_product(model, "3", task) == pytest.approx(1)
    assert lipschitz_merged(model, "3", task) == 0


def test_batch_norm_in_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(98, 4))
    for bound in (lipschitz_product, lipschitz_merged):
        with pytest.raises(LipschitzError, match=r"1 \(BatchNorm2d\).*eval\(\)"):
            bound(model, "3", TASK)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert lipschitz_merged(model, "3", TASK) == lipschitz_merged(model.eval(), "3", TASK)


def test_dropout_that_drops_is_no_fixed_map() -> None:
    """In eval mode the two projections cancel, in train mode a mask can keep them from it."""
    task = Task(input_shape=(2,), classes=2, mean=(0.0, 0.0), std=(1.0, 1.0))
    first, second = dense((0.6, 0), (0.8, 0)), dense((0.8, -0.6), (0, 0))
    model = nn.Sequential(first, nn.Dropout(0.5), second, nn.ReLU(), nn.Linear(2, 2))
    assert lipschitz_merged(model.eval(), "4", task) == pytest.approx(0, abs=1e-7)
    assert lipschitz_merged(model.train(), "4", task) == pytest.approx(2)
    x = torch.tensor([1.0, 0.0])
    dropped = second.weight @ (torch.tensor([2.0, 0.0]) * (first.weight @ x))
    assert 0.9 < float(dropped.norm()) <= 2  # what one mask does


def test_what_is_not_known_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Softmax(dim=1), nn.Linear(243, 4))
    with pytest.raises(LipschitzError, match=r"1 \(Softmax\); known are .*Conv2d.*ReLU"):
        lipschitz_product(model, "2", TASK)
    with pytest.raises(ChainError, match=r"dense layer, got 'features'.*: 2"):
        lipschitz_product(model, "features", TASK)


class Branching(nn.Module):
    """A network that adds its input again, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(243, 243), nn.Linear(243, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        return self.last(F.relu(self.first(flat)) + flat)  # type: ignore[no-any-return]


def test_a_network_that_is_no_chain_is_refused_at_the_place() -> None:
    with pytest.raises(ChainError, match=r"before last \(Linear\)"):
        lipschitz_product(Branching(), "last", TASK)
    assert [piece.name for piece in feature_chain(Branching(), "first", TASK)] == ["normalization"]


@pytest.mark.parametrize("name", ["lenet-zhu", "mlp(hidden=(24, 16))"])
def test_constants_near_an_image_hold_on_the_ball(name: str) -> None:
    model: nn.Module = create("models", name).build(TASK, seed=0).double()
    features, x = features_of(model, "classifier", TASK), image().double()
    stages = stages_at(feature_chain(model, "classifier", TASK), TASK, x)
    assert local_lipschitz(stages, 0.0) == pytest.approx(jacobian_norm(features, x), rel=1e-4)
    draw = generator("directions")
    for radius in (0.01, 0.1, 0.5):
        within = local_lipschitz(stages, radius)
        for _ in range(5):
            ends = []
            for _ in range(2):
                way = torch.randn(x.shape, generator=draw, dtype=torch.float64)
                ends.append(x + radius * way / way.norm())
            moved = float((features(ends[0]) - features(ends[1])).detach().norm())
            assert moved <= within * float((ends[0] - ends[1]).norm())
            assert jacobian_norm(features, ends[0]) <= within


def test_a_kink_inside_the_ball_is_seen() -> None:
    """max(0, 10 (x - 1)) at x = 0: flat within 1, slope 10 beyond."""
    task = Task(input_shape=(1,), classes=2, mean=(0.0,), std=(1.0,))
    model = nn.Sequential(dense((10,), bias=-10), nn.ReLU(), nn.Linear(1, 2))
    stages = stages_at(feature_chain(model, "2", task), task, torch.zeros(1))
    assert local_lipschitz(stages, 0.9) == 0
    assert local_lipschitz(stages, 1.1) == pytest.approx(10)
    near = neighborhood(model, "2", task, torch.zeros(1), radii=(0.5, 0.99))
    assert certified_distance(near, 1.0) == pytest.approx(0.99 + 1 / 10)  # the truth is 1.1


def test_the_certified_distance_is_the_inverse_of_the_integral() -> None:
    near = Neighborhood(radii=(1.0, 2.0), constants=(1.0, 3.0), everywhere=5.0)
    for gap, distance in ((0.5, 0.5), (1.0, 1.0), (2.5, 1.5), (4.0, 2.0), (9.0, 3.0)):
        assert certified_distance(near, gap) == pytest.approx(distance)
        assert certified_distance(near, gap) >= gap / near.everywhere


def test_no_image_is_closer_than_the_certified_distance() -> None:
    model: nn.Module = create("models", "lenet-zhu").build(TASK, seed=0).double()
    features, x = features_of(model, "classifier", TASK), image().double()
    near = neighborhood(model, "classifier", TASK, x)
    r, draw = features(x).detach(), generator("tries")
    gains = []
    for size in (1e-3, 1e-2, 0.1, 1.0):
        way = torch.randn(x.shape, generator=draw, dtype=torch.float64)
        other = (x + size * way / way.norm()).requires_grad_()
        for _ in range(20):  # uphill at a fixed distance: where f changes fastest
            (slope,) = torch.autograd.grad((features(other) - r).norm(), other)
            step = other.detach() + size * slope / slope.norm() - x
            other = (x + size * step / step.norm()).requires_grad_()
        gap = float((features(other) - r).detach().norm())
        assert gap / near.everywhere <= certified_distance(near, gap) <= size * (1 + 1e-9)
        gains.append(certified_distance(near, gap) * near.everywhere / gap)
    assert max(gains) > 5, "near the image it says far more than the constant everywhere"


def test_constants_near_an_image_refuse_what_they_do_not_know() -> None:
    model = create("models", "convnet64").build(TASK, seed=0).eval()
    chain = feature_chain(model, "classifier", TASK)
    pooled = [chain[0], *(piece for piece in chain if isinstance(piece.module, nn.MaxPool2d))]
    with pytest.raises(LipschitzError, match=r"features\.pool1 \(MaxPool2d\)"):
        stages_at(pooled, TASK, image())

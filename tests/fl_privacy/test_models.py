"""Networks: shapes of the papers, seeded initialization, fit for batched double backward."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fl_privacy.component import ComponentError, create
from fl_privacy.models.mlp import MLP
from fl_privacy.models.soteria import ConvNet64
from fl_privacy.models.zhu import LeNetZhu
from fl_privacy.protocols import Model
from fl_privacy.types import Task

NAMES = ("lenet-zhu", "convnet64", "mlp", "das-shallow", "das-fashionnet", "das-convnet")


def task(*shape: int, classes: int = 10) -> Task:
    channels = shape[0]
    return Task(input_shape=shape, classes=classes, mean=(0.5,) * channels, std=(0.25,) * channels)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("shape", "features"), [((3, 32, 32), 768), ((1, 28, 28), 588)])
def test_lenet_has_the_dense_layer_and_size_of_the_paper(
    shape: tuple[int, ...], features: int
) -> None:
    model = LeNetZhu().build(task(*shape), seed=0)
    assert dict(model.named_modules())["classifier"].in_features == features
    convolutions = (shape[0] * 25 + 1) * 12 + 3 * (12 * 25 + 1) * 12
    assert parameters_of(model) == convolutions + (features + 1) * 10


def test_lenet_is_uniform_within_one_half() -> None:
    model = LeNetZhu().build(task(3, 32, 32), seed=0)
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert values.abs().max() <= 0.5
    assert abs(float(values.mean())) < 5 * math.sqrt(1 / 12 / len(values))
    assert float(values.var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_convnet64_has_the_layers_of_the_paper(shape: tuple[int, ...]) -> None:
    model = ConvNet64().build(task(*shape), seed=0)
    modules = list(model.modules())
    widths = [m.out_channels for m in modules if isinstance(m, nn.Conv2d)]
    assert widths == [64, 128, 128, 256, 256, 256, 256, 256]
    assert dict(model.named_modules())["classifier"].in_features == 2304
    assert sum(isinstance(m, nn.MaxPool2d) for m in modules) == 2
    assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == len(widths)


def test_mlp_begins_with_a_dense_layer_with_bias() -> None:
    model = MLP(hidden=(7, 5)).build(task(3, 4, 4, classes=3), seed=0)
    dense = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [(48, 7), (7, 5), (5, 3)]
    assert dense[0].bias is not None
    assert isinstance(next(model.children()), nn.Flatten)


def test_mlp_takes_signals_and_no_hidden_layer() -> None:
    model = MLP(hidden=()).build(task(1, 30, classes=2), seed=0)
    assert model(torch.zeros(4, 1, 30)).shape == (4, 2)


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    component = create("models", name)
    assert isinstance(component, Model)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = component.build(task(1, 28, 28), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = component.build(task(1, 28, 28), seed=3).state_dict()
    other = component.build(task(1, 28, 28), seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_batched_gradients_can_be_differentiated_again(name: str) -> None:
    """What a gradient-matching attack does: vmap over targets of d|grad|^2 / d input."""
    shape = (1, 12, 12)
    model = create("models", name).build(task(*shape, classes=3), seed=0).eval()
    state = {k: v.detach() for k, v in model.state_dict().items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs = functional_call(model, {**state, **parameters}, (x.unsqueeze(0),))
        return nn.functional.cross_entropy(outputs, torch.tensor([1]))

    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def gradient_norm(x: Tensor) -> Tensor:
        squares = [g.square().sum() for g in grad(loss)(parameters, x).values()]
        return torch.stack(squares).sum()

    inputs = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    batched = vmap(grad(gradient_norm))(inputs)
    alone = torch.stack([grad(gradient_norm)(x) for x in inputs])
    assert float(batched.abs().max()) > 0
    torch.testing.assert_close(batched, alone, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "least"), [("lenet-zhu", 4), ("convnet64", 9)])
def test_inputs_that_are_no_images_are_refused(name: str, least: int) -> None:
    component = create("models", name)
    for shape in ((1, 100), (1, least - 1, 50)):
        with pytest.raises(ValueError, match=rf"at least {least}.*\(1, {shape[1]}.*mlp"):
            component.build(task(*shape), seed=0)
    assert component.build(task(1, least, least), seed=0)(torch.zeros(1, 1, least, least)).ndim == 2


@pytest.mark.parametrize(
    ("name", "hidden", "dropout"),
    [
        ("das-shallow", [256], False),
        ("das-fashionnet", [256, 128], True),
        ("das-convnet", [256, 128], True),
    ],
)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 7), (1, 1000), (2, 15)])
def test_networks_of_das_take_images_and_signals(
    name: str, hidden: list[int], dropout: bool, shape: tuple[int, ...]
) -> None:
    model = create("models", name).build(task(*shape, classes=9), seed=0)
    assert model(torch.zeros(2, *shape)).shape == (2, 9)
    modules = list(model.modules())
    dense = [m for m in modules if isinstance(m, nn.Linear)]
    assert [m.out_features for m in dense] == [*hidden, 9]
    if name != "das-convnet":
        assert dense[0].in_features == math.prod(shape)
    assert [m.p for m in modules if isinstance(m, nn.Dropout)] == [0.2] * dropout
    convolutions = [m for m in modules if isinstance(m, nn.Conv1d | nn.Conv2d)]
    assert len(convolutions) == 2 * (name == "das-convnet")
    outputs = model.train()(torch.rand(1, *shape)), model.eval()(torch.rand(1, *shape))
    assert all(out.isfinite().all() for out in outputs)


def test_das_convnet_refuses_what_is_neither_image_nor_signal() -> None:
    for shape in ((3,), (1, 1), (1, 4, 4, 4)):
        with pytest.raises(ValueError, match="das-shallow"):
            create("models", "das-convnet").build(task(*shape), seed=0)
    with pytest.raises(ComponentError, match="dropout"):
        create("models", "das-convnet(dropout=1)")


def test_widths_below_one_are_refused() -> None:
    with pytest.raises(ComponentError, match="hidden"):
        create("models", "mlp(hidden=(0,))")

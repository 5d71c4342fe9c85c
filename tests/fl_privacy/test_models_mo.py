"""The networks of Mo et al. and of Melis et al.: layers, sizes, what they refuse."""

import pytest
import torch
from torch import nn

from fl_privacy.component import ComponentError, create
from fl_privacy.layers import weight_layers
from fl_privacy.types import Task

CONVOLUTIONS = {
    "alexnet-mo": (16, 32, 64),
    "vgg11-mo": (16, 16, 16, 16, 32, 32, 64, 64),
    "melis": (32, 64, 128),
}
DENSE = {"alexnet-mo": (256, 5), "vgg11-mo": (256, 128, 5), "melis": (256, 5)}


def task(*shape: int, classes: int = 5) -> Task:
    channels = shape[0]
    return Task(input_shape=shape, classes=classes, mean=(0.5,) * channels, std=(0.25,) * channels)


@pytest.mark.parametrize("shape", [(3, 62, 47), (3, 32, 32)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_are_those_of_the_papers_in_order(name: str, shape: tuple[int, ...]) -> None:
    model = create("models", name).build(task(*shape), seed=0)
    layers = [model.get_submodule(layer) for layer in weight_layers(model, task(*shape))]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    assert tuple(m.out_channels for m in convolutions) == CONVOLUTIONS[name]
    assert {m.kernel_size for m in convolutions} == {(3, 3)}
    dense = layers[len(convolutions) :]
    assert tuple(m.out_features for m in dense if isinstance(m, nn.Linear)) == DENSE[name]
    kinds = [type(m) for m in model.modules() if not isinstance(m, nn.Sequential)]
    assert kinds.count(nn.MaxPool2d) == 3
    assert kinds.count(nn.ReLU) == len(layers) - 1
    assert kinds[-1] is nn.Linear


@pytest.mark.parametrize(
    ("spec", "features"),
    [
        ("alexnet-mo", 64 * 7 * 5),  # 62, 31, 15, 7 and 47, 23, 11, 5
        ("alexnet-mo(padding=0)", 64 * 6 * 4),  # 60, 30, 28, 14, 12, 6 and 45, 22, 20, 10, 8, 4
        ("vgg11-mo", 64 * 7 * 5),
        ("melis", 128 * 6 * 4),
    ],
)
def test_padding_decides_what_the_first_dense_layer_sees(spec: str, features: int) -> None:
    model = create("models", spec).build(task(3, 62, 47), seed=0)
    assert model.get_submodule("fc1").in_features == features


@pytest.mark.parametrize("shape", [(3, 10, 10), (104,), (1, 50)])
def test_fcnet_takes_images_signals_and_tables(shape: tuple[int, ...]) -> None:
    model = create("models", "fcnet-mo").build(task(*shape), seed=0)
    layers = weight_layers(model, task(*shape))
    assert layers == tuple(f"fc{i}" for i in range(1, 10))
    assert [model.get_submodule(n).out_features for n in layers] == [32] * 8 + [5]
    assert model(torch.zeros(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(
    ("spec", "least"),
    [("alexnet-mo", 8), ("alexnet-mo(padding=0)", 22), ("vgg11-mo(padding=0)", 32), ("melis", 22)],
)
def test_the_smallest_image_is_the_smallest_that_works(spec: str, least: int) -> None:
    component = create("models", spec)
    assert component.build(task(3, least, 50), seed=0)(torch.zeros(1, 3, least, 50)).shape == (1, 5)
    with pytest.raises(ValueError, match=rf"at least {least}.*choose another model"):
        component.build(task(3, least - 1, 50), seed=0)
    with pytest.raises(ValueError, match="expected images"):
        component.build(task(104), seed=0)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, "fcnet-mo"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    builds = [create("models", name).build(task(1, 24, 24), seed=s) for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (torch.nn.utils.parameters_to_vector(b.parameters()) for b in builds)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_glorot_weights_have_the_variance_of_their_fans() -> None:
    model = create("models", "melis").build(task(3, 32, 32), seed=0)
    weight = model.get_submodule("conv3").weight
    assert float(weight.detach().var()) == pytest.approx(2 / (64 * 9 + 128 * 9), rel=0.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_other_paddings_are_refused() -> None:
    with pytest.raises(ComponentError, match="padding"):
        create("models", "alexnet-mo(padding=2)")

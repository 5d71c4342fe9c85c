"""LeNet-5 as the representation network: its dense layers, its names, its seed."""

import pytest
import torch

from fl_privacy.component import create
from fl_privacy.dense_layers import dense_tail, seen_when_sent
from fl_privacy.types import Exchange, Observation, Task


def task(*shape: int, classes: int = 10) -> Task:
    channels = shape[0]
    return Task(input_shape=shape, classes=classes, mean=(0.5,) * channels, std=(0.25,) * channels)


@pytest.mark.parametrize(("shape", "first"), [((3, 32, 32), 400), ((1, 28, 28), 256)])
def test_three_dense_layers_end_it(shape: tuple[int, ...], first: int) -> None:
    known = task(*shape, classes=7)
    model = create("models", "lenet5").build(known, seed=0)
    assert dense_tail(model, known) == ("fc1", "fc2", "fc3")
    widths = [(model.get_submodule(n).in_features, n) for n in dense_tail(model, known)]
    assert [width for width, _ in widths] == [first, 120, 84]
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    builds = [create("models", "lenet5").build(task(1, 28, 28), seed=s) for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (build.get_submodule("fc3").weight for build in builds)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_small_images_are_refused_by_their_size() -> None:
    with pytest.raises(ValueError, match=r"at least 16.*\(1, 12, 12\)"):
        create("models", "lenet5").build(task(1, 12, 12), seed=0)
    assert create("models", "lenet5").build(task(1, 16, 16), seed=0)(torch.zeros(1, 1, 16, 16)).ndim


def test_every_dense_layer_sees_what_a_relu_gives_under_the_sent_weights() -> None:
    known = task(1, 28, 28)
    built, sent = (create("models", "lenet5").build(known, seed=s) for s in (0, 1))
    exchange = Exchange(1, 1, "0", 2, "", "", dict(sent.named_parameters()), {}, {}, {})
    seen = seen_when_sent(
        Observation("k", (exchange,), lambda: built, known), torch.rand(3, 1, 28, 28)
    )
    assert all(bool((values >= 0).all()) and bool(values.any()) for values in seen.values())
    weight, bias = sent.get_submodule("fc2").weight, sent.get_submodule("fc2").bias
    expected = (seen["fc2"].float() @ weight.T + bias).relu().double()
    torch.testing.assert_close(seen["fc3"], expected, rtol=1e-4, atol=1e-6)

"""Which parameters a part of the gradient names, and what it leaves out."""

import pytest
from torch import nn

from adversaries.parts import PartError, select

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "head.weight", "head.bias"]


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    model.add_module("head", nn.Linear(4, 2))
    return model


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", NAMES),
        ("-head.weight", [n for n in NAMES if n != "head.weight"]),
        ("all, -head", NAMES[:4]),
        ("-convolutions", NAMES[2:]),
        ("dense,-head.bias", ["2.weight", "2.bias", "head.weight"]),
        ("dense,-2,-head.weight", ["head.bias"]),
        ("head,0.bias", ["0.bias", "head.weight", "head.bias"]),
    ],
)
def test_names_are_added_and_those_with_a_minus_left_out(layers: str, chosen: list[str]) -> None:
    assert select(network(), layers, NAMES) == chosen


@pytest.mark.parametrize("layers", ["-haed", "head,-head", "-all", "haed", "-convolution"])
def test_an_unknown_name_and_an_empty_rest_are_refused(layers: str) -> None:
    with pytest.raises(PartError, match=r"expected all, convolutions, dense or some of 0\.weight"):
        select(network(), layers, NAMES)

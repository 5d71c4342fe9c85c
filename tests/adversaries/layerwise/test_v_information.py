"""The metric around `usable_information`: found where it is, not where it is not, refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adversaries.layerwise.v_information import VInformation
from fl_privacy.layers import LayerMetricError
from fl_privacy.seeding import generator
from fl_privacy.testing import check_layer_metric
from fl_privacy.testing.toys import toy_observations, toy_samples
from fl_privacy.types import LayerScores, Samples

SMALL = VInformation(family="logistic", folds=3, batches=6, batch_size=4, permutations=2)
HAS = (torch.arange(96) // 4) % 2


def bright(shift: float) -> Samples:
    """Half of the samples of each label have the property, and pixels brighter by ``shift``."""
    samples = toy_samples(96)
    inputs = samples.inputs + shift * HAS.view(-1, 1, 1, 1)
    return replace(samples, inputs=inputs, properties={"property": HAS})


def measured(samples: Samples | None, **changes: Any) -> LayerScores:
    metric = VInformation(**{**SMALL.model_dump(), **changes})
    observations, _ = toy_observations(2)
    return metric.measure(observations, samples, seed=0, device=torch.device("cpu"))


def column(found: LayerScores, name: str) -> Tensor:
    """The column, whose name begins so."""
    return next(values for n, values in found.columns.items() if n.startswith(name))


def of_labels() -> Samples:
    """Half of the labels have the property, all but once, and signs of a gradient show it."""
    samples = toy_samples(96)
    values = samples.labels // 2
    values[0] = 1
    return replace(samples, properties={"property": values})


@pytest.mark.parametrize(("samples", "features"), [(bright(1.0), "pooled"), (of_labels(), "raw")])
def test_a_planted_property_is_found_and_its_shuffled_twin_is_not(
    samples: Samples, features: str
) -> None:
    found = measured(samples, features=features)
    assert found.layers == ("1", "3")
    assert found.unit == "nats"
    assert found.n == 3 * 2 * 6
    assert (found.values > 0.4).all()
    assert (column(found, "null, largest") < 0.1).all()
    torch.testing.assert_close(column(found, "ceiling"), torch.full((2,), math.log(2)).double())
    assert (found.values <= column(found, "ceiling")).all()


def test_what_means_nothing_is_not_found_but_in_sample() -> None:
    found = measured(bright(0.0), family="forest", trees=10)
    assert (found.values.abs() < 0.1).all()
    assert (column(found, "in-sample, eq. (1)") > 0.15).all()
    assert torch.equal(column(found, "at least 0"), found.values.clamp_min(0))
    assert found.standard_errors is None  # folds are no repeats, so none that makes an interval


def of_people() -> Samples:
    """Thirty people, half of whom have a property that means nothing, eight pictures of each."""
    draw, people = generator(5, "people"), torch.arange(240) // 8
    looks = 2 * torch.randn(30, 1, 6, 6, generator=draw)[people]
    has = (torch.randperm(30, generator=draw) % 2)[people]
    samples = toy_samples(240)
    inputs = samples.inputs + looks
    return replace(samples, inputs=inputs, properties={"property": has}, people=people)


def test_people_are_kept_apart_so_that_to_know_them_is_no_use() -> None:
    samples, one = of_people(), {"permutations": 1, "layers": ("1",), "batch_size": 8}
    known, unknown = (measured(s, **one) for s in (samples, replace(samples, people=None)))
    assert float(unknown.values) > 0.4  # whoever is on a picture was seen before
    assert float(known.values) < 0.1
    assert column(known, "people with it") == 15
    assert column(known, "people without it") == 15
    assert not any(name.startswith("people") for name in unknown.columns)
    assert column(unknown, "samples with it") <= 120


def test_layers_are_measured_alike_alone_and_together() -> None:
    together, alone = (
        measured(bright(0.3), permutations=1, layers=layers) for layers in ((), ("3",))
    )
    assert alone.layers == ("3",)
    assert alone.values[0] == together.values[1]


@pytest.mark.parametrize(
    ("samples", "changes", "reason"),
    [
        (None, {}, "at least one sample"),
        (toy_samples(8), {}, "no property in the samples: load some"),
        (bright(0), {"property": "smiling"}, "no property 'smiling' .* one of property"),
        (bright(0), {"layers": ("2",)}, "no layer '2' .*; layers: 1, 3"),
        (bright(0), {"batch_size": 17}, "holds 16 samples .* expected 51 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    samples: Samples | None, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(LayerMetricError, match=reason):
        measured(samples, **changes)


def test_it_keeps_the_contract() -> None:
    check_layer_metric(VInformation(folds=3, batches=3, permutations=1, trees=2))

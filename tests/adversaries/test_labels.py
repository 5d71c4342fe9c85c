from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import adversaries.reference
from adversaries.labels import (
    Evidence,
    classifier,
    count_labels,
    infer_labels,
    mean_outputs,
    regressed,
    single_label,
    unit_functional,
)
from adversaries.local_steps import skeleton
from adversaries.reference import COUNT, Reference, evenly, noise, reference
from adversaries.targets import prepare
from fl_privacy import component
from fl_privacy.testing.toys import TASK, toy_model, toy_observations, toy_samples
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Task


def gradient_of(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    loss = F.cross_entropy(model(TASK.normalize(inputs)), labels)
    names = [n for n, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("seen", ["bias", "rows"])
def test_one_label_is_exact_whatever_the_sign_of_the_representation(
    label: int, activation: type[nn.Module], seen: str
) -> None:
    torch.manual_seed(label)
    bias = seen == "bias"
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), activation(), nn.Linear(16, 4, bias))
    for i in range(8):
        gradient = gradient_of(model, toy_samples(8).inputs[i : i + 1], torch.tensor([label]))
        assert infer_labels(gradient, model, dict(model.state_dict()), TASK, 1).tolist() == [label]


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_of_two_classes_without_a_bias(label: int) -> None:
    """Both rows are equally long then, and the references' sign decides."""
    two = TASK.model_copy(update={"classes": 2})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Sigmoid(), nn.Linear(16, 2, False))
    gradient = gradient_of(model, toy_samples(1).inputs, torch.tensor([label]))
    assert infer_labels(gradient, model, dict(model.state_dict()), two, 1).tolist() == [label]


def test_only_the_true_class_has_a_negative_logit_gradient() -> None:
    model, samples = toy_model(), toy_samples(20)
    for i in range(20):
        gradient = gradient_of(model, samples.inputs[i : i + 1], samples.labels[i : i + 1])
        slopes = gradient["3.bias"]
        assert (slopes < 0).nonzero().flatten().tolist() == [samples.labels[i]]
        assert single_label(slopes, None).tolist() == [samples.labels[i]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_counts_are_exact_when_the_prior_is(labels: list[int]) -> None:
    n = len(labels)
    counts = torch.bincount(torch.tensor(labels), minlength=10).double()
    prior = torch.softmax(torch.arange(10.0, dtype=torch.float64) / 10, 0)
    inferred = count_labels(prior - counts / n, prior, n)
    assert inferred.tolist() == sorted(labels)


@given(
    st.lists(st.floats(-1, 1), min_size=10, max_size=10) | st.just([5.0] * 10),
    st.integers(min_value=1, max_value=64),
)
@settings(max_examples=50, deadline=None)
def test_as_many_labels_as_images_whatever_the_evidence(noise: list[float], images: int) -> None:
    evidence = torch.tensor(noise, dtype=torch.float64)
    prior = torch.full((10,), 0.1, dtype=torch.float64)
    inferred = count_labels(evidence, prior, images)
    assert len(inferred) == images
    assert inferred.ge(0).all()
    assert inferred.lt(10).all()


def test_repeated_classes_of_a_batch_are_counted_on_an_untrained_network() -> None:
    model = toy_model()
    labels = torch.tensor([0, 0, 0, 2, 2, 3])
    gradient = gradient_of(model, toy_samples(6).inputs, labels)
    assert infer_labels(gradient, model, dict(model.state_dict()), TASK, 6).tolist() == [
        0,
        0,
        0,
        2,
        2,
        3,
    ]


@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("withheld", ["3.bias", "3.weight"])
def test_what_a_client_withholds_is_read_as_if_it_were_not_there(
    withheld: str, images: int
) -> None:
    """It comes back unchanged, so its gradient is zero: no evidence for any class."""
    model, samples = toy_model(), toy_samples(images)
    labels = torch.tensor([3]) if images == 1 else torch.tensor([0, 0, 0, 2, 2, 3])
    gradient = gradient_of(model, samples.inputs, labels)
    zeros = {**gradient, withheld: torch.zeros_like(gradient[withheld])}
    absent = {n: g for n, g in gradient.items() if n != withheld}
    state = dict(model.state_dict())
    inferred = infer_labels(zeros, model, state, TASK, images)
    assert torch.equal(inferred, infer_labels(absent, model, state, TASK, images))
    if images == 1:
        assert torch.equal(inferred, labels)


def test_without_evidence_the_labels_are_a_guess() -> None:
    model = toy_model()
    assert infer_labels({}, model, {}, TASK, 6).tolist() == [0, 0, 1, 1, 2, 3]


class Heads(nn.Module):
    """Three heads, of which one is the output; two run."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.body = nn.Linear(36, 4), nn.Linear(36, 8)
        self.out, self.unused = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.early(x)
        out: Tensor = self.out(self.body(x).sigmoid())
        return out


def test_the_classifier_is_the_layer_whose_output_is_the_networks() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 4, bias=False))
    assert classifier(toy_model(), TASK) == "3"
    assert classifier(flat, TASK) == "1"
    assert classifier(nn.Sequential(flat, nn.LogSoftmax(1)), TASK) == "0.1"
    assert classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), TASK) is None
    assert classifier(Heads(), TASK) == "out"


@pytest.mark.parametrize("images", [1, 3])
def test_heads_that_are_not_the_output_do_not_mislead(images: int) -> None:
    torch.manual_seed(0)
    model, labels = Heads(), torch.tensor([1, 3, 3])[:images]
    outputs = model(toy_samples(images).inputs)
    loss = nn.functional.cross_entropy(outputs, labels)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(
        loss, list(named.values()), materialize_grads=True, allow_unused=True
    )
    gradient = dict(zip(named, found, strict=True))
    state = dict(model.state_dict())
    assert infer_labels(gradient, model, state, TASK, images).tolist() == labels.tolist()


DATA = component.create("datasets", "fashion-mini")
PICTURES = DATA.load("train")


def client_gradient(
    spec: str, images: int, classes: int, seed: int
) -> tuple[nn.Module, dict[str, torch.Tensor], list[int]]:
    """A network, the gradient of a client that holds some classes only, and its labels."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.randperm(10, generator=draw)[:classes]
    pool = torch.isin(PICTURES.labels, own).nonzero().flatten()
    chosen = pool[torch.randperm(len(pool), generator=draw)[:images]]
    model = component.create("models", spec).build(DATA.task(), seed=seed)
    outputs = model(DATA.task().normalize(PICTURES.inputs[chosen]))
    loss = F.cross_entropy(outputs, PICTURES.labels[chosen])
    names = [n for n, _ in model.named_parameters()]
    gradient = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    return model, gradient, sorted(PICTURES.labels[chosen].tolist())


@pytest.mark.parametrize("spec", ["lenet-zhu", "mlp"])
@pytest.mark.parametrize("images", [2, 4, 8, 16, 32])
def test_counts_of_two_class_clients_are_exact_on_untrained_networks(
    spec: str, images: int
) -> None:
    for seed in (0, 1, 9):  # 9 is wrong without the regression of `mean_outputs`
        model, gradient, labels = client_gradient(spec, images, 2, seed)
        state = dict(model.state_dict())
        assert infer_labels(gradient, model, state, DATA.task(), images).tolist() == labels


@pytest.mark.parametrize("spec", ["lenet-zhu", "mlp"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_without_the_bias_the_rows_miss_one_image_in_sixteen_at_most(
    spec: str, auxiliary: bool
) -> None:
    held = DATA.load("test") if auxiliary else None
    model, gradient, labels = client_gradient(spec, 16, 2, 0)
    del gradient["classifier.bias"]
    found = infer_labels(gradient, model, dict(model.state_dict()), DATA.task(), 16, held)
    counts = [torch.bincount(torch.as_tensor(each), minlength=10) for each in (found, labels)]
    assert torch.minimum(*counts).sum() >= 15


def test_all_samples_alike_make_every_estimate_exact() -> None:
    """With one representation the mean output is its softmax and the functional is exact."""
    task, draw = DATA.task(), torch.Generator().manual_seed(0)
    model = component.create("models", "mlp(hidden=(16,))").build(task, seed=0)
    known = reference(model, dict(model.state_dict()), task, "classifier", None)
    hidden = torch.rand(16, generator=draw, dtype=torch.float64)
    truth = (known.weight @ hidden + known.bias).softmax(0)
    counts = torch.tensor([5, 0, 0, 7, 0, 1, 0, 0, 3, 0], dtype=torch.float64)
    slopes = truth - counts / 16
    evidence = Evidence(slopes, slopes[:, None] * hidden)
    wide = replace(known, logits=1e-9 * known.logits)  # references that do not vary either
    torch.testing.assert_close(mean_outputs(evidence, wide, 16), truth, rtol=1e-4, atol=1e-4)


def test_mean_outputs_follow_what_absent_classes_show() -> None:
    """If one output is linear in another, seeing one mean tells the other one."""
    shown = 0.1 + 0.2 * torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    outputs = torch.stack([0.2 + 0.5 * shown, shown, 0.8 - 1.5 * shown], 1)
    present, truth = torch.tensor([True, False, True]), torch.tensor([0.34, 0.28, 0.38])
    slopes = truth.double() - torch.tensor([0.25, 0.0, 0.75])
    found = regressed(outputs, outputs.log(), slopes, None, present)
    assert (found - truth).abs().max() < 0.2 * (outputs.mean(0) - truth).abs().max()
    assert found.sum() == pytest.approx(1)
    assert found[1] == slopes[1]


@pytest.mark.parametrize("features", [64, 256])
def test_the_unit_functional_is_one_on_what_it_has_not_seen(features: int) -> None:
    """Also with as many features as references, where least squares would fit the noise."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(8, features, generator=draw, dtype=torch.float64)
    mean = 3 * torch.rand(features, generator=draw, dtype=torch.float64)

    def representations(count: int) -> torch.Tensor:
        parts = torch.randn(count, 8, generator=draw, dtype=torch.float64) @ directions
        rest = torch.randn(count, features, generator=draw, dtype=torch.float64)
        return mean + parts + rest

    made, fresh = representations(64), representations(200)
    functional = unit_functional(made)
    assert (fresh @ functional - 1).square().mean().sqrt() < 0.1
    scaled = 3 * made @ unit_functional(3 * made)  # units of the representation do not matter
    torch.testing.assert_close(scaled, made @ functional)


@pytest.mark.parametrize("shape", [(3, 9, 5), (2, 40), (7,)])
def test_noise_fits_every_kind_of_input_and_stays_in_range(shape: tuple[int, ...]) -> None:
    channels = shape[0]
    task = Task(input_shape=shape, classes=2, mean=(0.2,) * channels, std=(0.4,) * channels)
    pixels = task.denormalize(noise(task))
    assert pixels.shape == (COUNT, *shape)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert pixels.flatten(1).mean(1).std() > 0.05  # of varying brightness, unlike white noise
    assert torch.equal(noise(task), noise(task))


def test_auxiliary_data_is_taken_from_all_of_it() -> None:
    assert evenly(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    chosen = evenly(torch.arange(10_000))
    assert len(chosen) == COUNT
    assert chosen[[0, -1]].tolist() == [0, 9_999]


def test_aggregates_and_float64_updates_have_labels_too() -> None:
    aggregates, _ = toy_observations(3, threat_model=ThreatModel(unit="aggregate"))
    (aggregate,) = aggregates
    model = skeleton(toy_model(), LocalTraining(lr=0.1))
    assert prepare(aggregate, model).labels.tolist() == [0, 1, 2]
    (exchange,) = aggregate.exchanges
    for dtype in (torch.float32, torch.float64):
        update = {n: u.to(dtype) for n, u in exchange.update.items()}
        sent = {n: p.to(dtype) for n, p in exchange.parameters.items()}
        other = replace(exchange, update=update, parameters=sent)
        assert len(prepare(replace(aggregate, exchanges=(other,)), model).labels) == 3


def test_references_go_through_the_network_once_for_all_that_were_sent_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    run = adversaries.reference._reference

    def counted(*arguments: object) -> Reference:
        asked.append("once")
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adversaries.reference, "_reference", counted)
    (observation, *_), _ = toy_observations(1)
    (exchange,) = observation.exchanges
    pair = replace(observation, exchanges=(replace(exchange, num_examples=2),))
    model = skeleton(toy_model(), LocalTraining(lr=0.1))
    prepare(pair, model)
    prepare(pair, model)
    assert len(asked) == 1
    elsewhere = replace(exchange, num_examples=2, global_digest="other")
    prepare(replace(pair, exchanges=(elsewhere,)), model)
    assert len(asked) == 2

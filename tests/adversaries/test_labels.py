import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from adversaries.labels import class_evidence, classifier, count_labels, idlg_label, infer_labels
from fl_privacy.testing.toys import TASK, toy_model, toy_samples


def gradient_of(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    loss = F.cross_entropy(model(TASK.normalize(inputs)), labels)
    names = [n for n, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("bias", [True, False])
def test_idlg_is_exact_for_one_sample(label: int, bias: bool) -> None:
    torch.manual_seed(label)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 16), nn.Sigmoid(), nn.Linear(16, 4, bias=bias)
    )
    gradient = gradient_of(model, toy_samples(1).inputs, torch.tensor([label]))
    state = dict(model.state_dict())
    assert infer_labels(gradient, model, state, TASK, 1).tolist() == [label]


def test_only_the_true_class_has_a_negative_logit_gradient() -> None:
    model, samples = toy_model(), toy_samples(20)
    for i in range(20):
        gradient = gradient_of(model, samples.inputs[i : i + 1], samples.labels[i : i + 1])
        evidence = class_evidence(gradient, model, TASK)
        assert evidence is not None
        assert (evidence < 0).nonzero().flatten().tolist() == [samples.labels[i]]
        assert idlg_label(evidence).tolist() == [samples.labels[i]]


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


def test_without_evidence_the_labels_are_a_guess() -> None:
    model = toy_model()
    assert infer_labels({}, model, {}, TASK, 6).tolist() == [0, 0, 1, 1, 2, 3]


def test_the_classifier_is_the_last_linear_layer_with_a_row_a_class() -> None:
    assert classifier(toy_model(), 4) == ("3.weight", "3.bias")
    assert classifier(nn.Linear(36, 4, bias=False), 4) == ("weight", None)
    assert classifier(nn.Conv2d(1, 4, 3), 4) is None

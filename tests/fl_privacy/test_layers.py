"""The layers that are compared: which they are, their order, and their names."""

import torch
from torch import Tensor, nn

from fl_privacy.component import create
from fl_privacy.layers import weight_layers, weight_of
from fl_privacy.types import Task

TASK = Task(input_shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.5,))


class Backwards(nn.Module):
    """Made in another order than it runs; one layer twice, one never, one weight shared."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.twin = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4, bias=False))
        self.body[1].weight = self.twin.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.body(inputs.flatten(1)))
        outputs: Tensor = self.head(self.twin(self.twin(hidden)))
        return outputs


def test_layers_come_in_forward_order_each_weight_once_without_normalization() -> None:
    assert weight_layers(Backwards(), TASK) == ("body.0", "twin", "head")


def test_a_layer_names_its_weight_as_the_parameters_of_the_model_do() -> None:
    for model in (Backwards(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))):
        parameters = dict(model.named_parameters())
        assert all(parameters[weight_of(name)].ndim == 2 for name in weight_layers(model, TASK))


def test_a_network_that_is_one_layer_has_the_empty_name() -> None:
    task = Task(input_shape=(5,), classes=3, mean=(0.0,) * 5, std=(1.0,) * 5)
    assert weight_layers(nn.Linear(5, 3), task) == ("",)
    assert weight_of("") == "weight"


def test_convolutions_count_and_the_model_stays_as_it_was() -> None:
    task = Task(input_shape=(1, 28, 28), classes=3, mean=(0.5,), std=(0.5,))
    model = create("models", "lenet5").build(task, seed=0).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert weight_layers(model, task) == ("conv1", "conv2", "fc1", "fc2", "fc3")
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

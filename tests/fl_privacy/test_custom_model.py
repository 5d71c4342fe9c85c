"""A network of the user's own: every way in which it can be wrong is said in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import nn

from fl_privacy.attack_command import attack
from fl_privacy.custom_model import ModelError, check_runs, custom_model
from fl_privacy.plan import Plan
from fl_privacy.recording import RecordingError
from fl_privacy.testing.toys import TASK

SOURCE = """
import torch
from torch import nn

toy = nn.Linear(36, 4)


class Net(nn.Sequential):
    def __init__(self, hidden=16, bias=True):
        super().__init__(
            nn.Flatten(), nn.Linear(36, hidden), nn.Sigmoid(), nn.Linear(hidden, 4, bias=bias)
        )


def needs(width, depth=1):
    return Net(width)


def fails():
    return Net()[7]


def number():
    return 3


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


def wide():
    return Net(99)


def without():
    return Net(bias=False)


def more():
    net = Net()
    net.add_module("extra", nn.Linear(4, 4))
    return net
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder, which is not on the import path."""
    name = f"net_{uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"{name}_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_a_class_or_a_function_in_the_current_folder_is_found(module: str) -> None:
    assert isinstance(custom_model(f"{module}:Net")(), nn.Sequential)
    assert isinstance(custom_model(f"{module}:wide")(), nn.Sequential)


def test_the_current_folder_hides_nothing_that_is_installed(module: str, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("resnet18 = None")
    assert type(custom_model("torchvision.models:resnet18")()).__name__ == "ResNet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}", "expects package.module:factory"),
        (":Net", "expects package.module:factory"),
        ("{}_no:Net", "cannot import .*PYTHONPATH"),
        ("{}_broken:Net", "division by zero.*--debug"),
        ("{}:Nett", "has no 'Nett'; it defines Net, needs, fails"),
        ("torch:__version__", "expected a function or class .* got TorchVersion"),
        ("{}:needs", "needs width: expected a factory without arguments"),
        ("{}:fails", "failed with IndexError: index 7 is out of range.*--debug"),
        ("{}:number", "expected a torch.nn.Module when called, got int"),
        ("{}:lazy", "1.weight has no shape yet"),
    ],
)
def test_what_is_no_factory_is_refused(module: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        custom_model(name.format(module))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("wide", r"'1\.weight': the model expects shape \(99, 36\), .* holds \(16, 36\)"),
        ("without", r"'3\.bias' of the recording is not in the model"),
        ("more", r"'extra\.weight' of the model is not in the recording"),
    ],
)
def test_a_network_that_was_not_trained_here_is_refused_before_any_work(
    module: str, run: Path, factory: str, message: str
) -> None:
    with pytest.raises(RecordingError, match=message):
        attack(run, Plan(adversary="analytic"), model=f"{module}:{factory}")
    assert not (run / "results").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(7, 4), r"does not run on one input of shape \(1, 6, 6\)"),
        (lambda: nn.Embedding(9, 4), "token ids are out of scope"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), r"gives shape \(1, 5\).*4 classes"),
        (
            lambda: nn.Sequential(nn.Flatten(0, 1), nn.LSTM(6, 4)),
            "gives tuple for one input: expected one logit",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_task_is_refused(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_runs(
            nn.Sequential(nn.Flatten(0, 1), build()) if "tuple" in message else build(), TASK
        )


def test_the_check_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 4)).train()
    check_runs(model, TASK)
    assert model.training
    assert torch.equal(model[1].running_mean, torch.zeros(36))  # type: ignore[arg-type]

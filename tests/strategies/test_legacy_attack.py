"""A NumPyClient app is recorded with Flower's own messages and attacked with the user's network.

Its arrays have no names, its recording names neither task nor training: all of that is given
to the attack, as on the command line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from flwr.client import NumPyClient
from flwr.common import FitIns, NDArrays, ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins
from flwr.server.compat.grid_client_proxy import GridClientProxy
from torch import nn
from torch.nn import functional as F

from fl_privacy.attack_command import attack
from fl_privacy.plan import Plan
from fl_privacy.recording import Manifest, Recording, RecordingError, RecordingWriter
from fl_privacy.threat_model import ThreatModel, ThreatModelError
from fl_privacy.types import LocalTraining, Samples, Task
from strategies.grid import RecordingGrid
from tests.strategies.in_process_grid import InProcessGrid

TASK = Task(input_shape=(1, 6, 6), classes=4, mean=(0.5,), std=(0.5,))
TRAINING = LocalTraining(lr=0.1)
HERE = "tests.strategies.test_legacy_attack"
NODES = (11, 12, 13)


class Net(nn.Sequential):
    """The app's network; with batch norm, so that integer buffers travel too."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            super().__init__(
                nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4)
            )
            self.eval()


def swapped() -> nn.Module:
    """The right tensors in another order."""
    net = Net()
    return nn.Sequential(net[1], net[0], net[2], net[3])


def held_by(node: int) -> Samples:
    draw = torch.Generator().manual_seed(node)
    return Samples(torch.rand(1, 1, 6, 6, generator=draw), torch.tensor([node % 4]))


class Client(NumPyClient):
    """One SGD step on one image, written as the Flower tutorials write it."""

    def __init__(self, node: int) -> None:
        self.net, self.held = Net(), held_by(node)

    def fit(self, parameters: NDArrays, config: object) -> tuple[NDArrays, int, dict[str, float]]:  # type: ignore[override]
        state = zip(self.net.state_dict(), map(torch.tensor, parameters), strict=True)
        self.net.load_state_dict(dict(state))
        optimizer = torch.optim.SGD(self.net.parameters(), lr=TRAINING.lr)
        outputs = self.net(TASK.normalize(self.held.inputs))
        F.cross_entropy(outputs, self.held.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return [t.numpy() for t in self.net.state_dict().values()], len(self.held), {}


def answer(content: RecordDict, node: int) -> RecordDict:
    """What Flower does on the client's side of a legacy app."""
    result = Client(node).to_client().fit(recorddict_to_fitins(content, keep_input=True))
    return fitres_to_recorddict(result, keep_input=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One round of the app, recorded with nothing said about it."""
    sent = ndarrays_to_parameters([t.numpy() for t in Net().state_dict().values()])
    with RecordingWriter.open(tmp_path / "recording", Manifest()) as writer:
        grid = RecordingGrid(InProcessGrid(answer, NODES), writer)
        for node in NODES:
            GridClientProxy(node, grid, run_id=1).fit(FitIns(sent, {}), timeout=10, group_id=1)
    return tmp_path


def plan(adversary: str) -> Plan:
    training = TRAINING.model_copy(update={"batch_norm": "eval"})
    return Plan(adversary=adversary, threat_model=ThreatModel(training=training))


def test_the_images_come_back_in_their_own_shapes_and_labels(run: Path) -> None:
    result, _ = attack(run, plan("dlg(iterations=60)"), model=f"{HERE}:Net", task=TASK)
    rows = result.rows()
    assert sorted(row["node"] for row in rows) == [str(node) for node in NODES]
    assert [row["images"] for row in rows] == [1, 1, 1]
    for row in rows:
        found, truth = result.reconstruction(row["key"]), held_by(int(row["node"]))
        assert found is not None
        assert found.labels.tolist() == truth.labels.tolist()
        assert (found.inputs - truth.inputs).abs().mean() < 0.02  # a grey picture: 0.25


def test_what_the_recording_does_not_say_is_asked_for_one_by_one(run: Path) -> None:
    unsaid = Plan(adversary="gradient_similarity")
    with pytest.raises(ThreatModelError, match=r"--task FILE\.toml"):
        attack(run, unsaid)
    with pytest.raises(ThreatModelError, match=r"--model package\.module:factory"):
        attack(run, unsaid, task=TASK)
    with pytest.raises(ThreatModelError, match=r"--threat-model: training = \{"):
        attack(run, unsaid, model=f"{HERE}:Net", task=TASK)


def test_the_first_array_that_does_not_fit_is_named_by_its_place(run: Path) -> None:
    with pytest.raises(RecordingError, match=r"array 0 .*\(2, 1, 3, 3\).*'0\.weight'.*\(2,\)"):
        attack(run, plan("analytic"), model=f"{HERE}:swapped", task=TASK)


def test_integer_buffers_take_their_place_but_are_no_part_of_the_update(run: Path) -> None:
    recording = Recording(run / "recording")
    (first, *_) = ThreatModel(training=TRAINING).observe(recording, model=Net, task=TASK)
    (exchange,) = first.exchanges
    assert list(exchange.update) == [name for name, _ in Net().named_parameters()]
    assert list(exchange.buffers) == ["1.running_mean", "1.running_var"]
    assert exchange.num_examples == 1

"""Apps that know nothing of fl-privacy, recorded as docs/record-your-app.md says, in Flower."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fl_privacy.recording import Recording
from fl_privacy.simulation import follow, require_completed
from fl_privacy.superlink import CONNECTION, private_superlink
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Task

pytestmark = pytest.mark.flower
ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs/record-your-app.md").read_text()
TASK = Task(input_shape=(1, 8, 8), classes=10, mean=(0.5,), std=(0.5,))
TRAINING = LocalTraining(lr=0.1, batch_size=4)
CLIENTS, ROUNDS = 2, 2


def block(number: int, folder: Path) -> tuple[list[str], list[str]]:
    """Imports, and numbered lines, of a code block of the guide; recordings go to ``folder``."""
    lines = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)[number].splitlines()
    told = [re.sub(r'"/recordings', f'"{folder}', re.sub(r"  # \d$", "", line)) for line in lines]
    numbered = [new for new, old in zip(told, lines, strict=True) if re.search(r"# \d$", old)]
    return [line for line in told if line.startswith("from ")], numbered


def run(app: Path, log: Path) -> None:
    with private_superlink() as link:
        size = f"num-supernodes={CLIENTS} client-resources-num-cpus=1"
        command = ["flwr", "run", str(app), CONNECTION, "--stream", "--federation-config", size]
        run_id, crash = follow(link, command, log, lambda line: None)
        require_completed(link, run_id, crash, log)


def check(recording: Recording, model: type[nn.Module]) -> None:
    """Every update is the step that a client of the app takes from what it was sent."""
    entries = list(recording.entries())
    assert sorted((e.round, e.num_examples) for e in entries) == [(1, 4), (1, 4), (2, 4), (2, 4)]
    assert recording.verify() == []
    observed = ThreatModel(training=TRAINING).observe(recording, model=model, task=TASK)
    task = sys.modules[model.__module__]
    steps = []
    for partition in range(CLIENTS):
        net = model()
        state = {**observed[0].exchanges[0].parameters, **observed[0].exchanges[0].buffers}
        net.load_state_dict({n: t.clone() for n, t in state.items()}, strict=False)
        task.train(net, *task.load_data(partition, CLIENTS), lr=0.1)
        steps.append({n: p.detach() - state[n] for n, p in net.named_parameters()})
    for one in observed[:CLIENTS]:
        found = one.exchanges[0].update
        distances = [max(float((found[n] - step[n]).abs().max()) for n in found) for step in steps]
        assert min(distances) < 1e-6
        assert max(distances) > 1e-4


def module_of(app: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> type[nn.Module]:
    monkeypatch.syspath_prepend(str(app))
    found: type[nn.Module] = __import__(f"{name}.task", fromlist=["Net"]).Net
    return found


@pytest.mark.timeout(600)
def test_two_lines_around_the_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, place = tmp_path / "app", tmp_path / "recordings"
    shutil.copytree(ROOT / "tests/apps/quickstart", app)
    imports, lines = block(0, place)
    assert len(lines) == 2
    server = app / "quickstart/server_app.py"
    text = server.read_text()
    indent = "    "
    added = "".join(f"{indent}{line}\n" for line in lines)
    text = text.replace(f"{indent}strategy.start(", f"{added}{indent}strategy.start(")
    server.write_text(
        text.replace("\nfrom quickstart", "\n".join(["", *imports, "from quickstart"]))
    )
    run(app, tmp_path / "log")
    model = module_of(app, monkeypatch, "quickstart")
    check(Recording(place / "first/recording"), model)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        initial = model().state_dict()
    first = next(Recording(place / "first/recording").entries())
    sent = Recording(place / "first/recording").sent(first)
    assert all(torch.equal(sent[name], value) for name, value in initial.items())


@pytest.mark.timeout(600)
def test_one_line_at_the_end_of_a_legacy_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, place = tmp_path / "app", tmp_path / "recordings"
    shutil.copytree(ROOT / "tests/apps/legacy", app)
    shutil.copy(ROOT / "tests/apps/quickstart/quickstart/task.py", app / "legacy")
    imports, lines = block(1, place)
    assert len(lines) == 1
    server = app / "legacy/server_app.py"
    server.write_text("\n".join([server.read_text(), *imports, *lines, ""]))
    run(app, tmp_path / "log")
    (recorded,) = place.iterdir()
    check(Recording(recorded / "recording"), module_of(app, monkeypatch, "legacy"))

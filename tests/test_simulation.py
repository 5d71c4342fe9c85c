"""Real Flower simulations on a private SuperLink, from the bundle alone."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from sklearn.datasets import load_digits

from clients.active_property import HEAD, train_actively
from fl_privacy.code_digest import digest_of
from fl_privacy.component import ComponentError
from fl_privacy.preflight import check_ray_address, check_resources
from fl_privacy.processes import marked
from fl_privacy.recording import Recording
from fl_privacy.seeding import derive_seed
from fl_privacy.simulation import RAY_TIMEOUT, assemble_app, follow, round_of, simulate
from fl_privacy.superlink import SimulationError, SuperLink, signals_raise
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import LocalTraining

CLIENTS, ROUNDS = 4, 2
SMALL = ("--dataset", "digits", "--model", "mlp", "--clients", str(CLIENTS))


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What every process started by the test carries; all of them must end by themselves."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("FL_PRIVACY_TEST", value)
    yield f"FL_PRIVACY_TEST={value}"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fl_privacy.cli import main; main()", *arguments]


@pytest.mark.flower
def test_a_run_from_the_bundle_alone(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = assemble_app(tmp_path / "app")
    with (app / "fl_privacy" / "seeding.py").open("a") as file:
        file.write("# so that no installed copy has this digest\n")
    stale = tmp_path / "ray" / "ray_current_cluster"
    stale.parent.mkdir()
    stale.write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    run, lines = tmp_path / "run", list[str]()
    simulate(
        {
            "dataset": digits_with_property(tmp_path / "digits.npz"),
            "model": "mlp",
            "num-server-rounds": ROUNDS,
            "min-clients": CLIENTS,
            "batch-size": 8,
            "audit": True,
            "client-property": "high",
            "client-property-schedule": "every:2",
            "client-active-clients": 1,
            "client-defense": "gaussian_noise(scale=0.01)+top_k(share=0.05)",
            "client-defended-share": 0.5,
            "client-encoding": "sparse",
        },
        out=run,
        app=app,
        clients=CLIENTS,
        stream=lines.append,
    )
    assert marked(mark) == set()
    assert [r for line in lines if (r := round_of(line))] == [(1, ROUNDS), (2, ROUNDS)]
    assert (run / "simulation.log").read_text().splitlines() == lines

    recording = Recording(run / "recording")
    assert recording.manifest.code_digest == digest_of(app)
    assert not [key for key in recording.manifest.run_config if key.startswith("client-")]
    assert recording.verify() == []
    entries = list(recording.entries())
    assert sorted(entry.round for entry in entries) == [1] * CLIENTS + [2] * CLIENTS
    assert len({entry.node for entry in entries}) == CLIENTS
    assert all(len(recording.returned(entry)["dense1.weight"]) == 256 for entry in entries)
    encoded = [entry.bytes for entry in entries if entry.payload == "sparse-update"]
    assert sorted(encoded)[: CLIENTS * ROUNDS // 2][-1] < max(e.bytes for e in entries) / 5
    assert sum("replies are sparse" in line for line in lines) == ROUNDS
    defenses = [json.loads(path.read_text()) for path in run.glob("truth/**/defense.json")]
    assert len(defenses) == CLIENTS * ROUNDS
    for entry in entries:
        folder = TruthVault(run / "truth").root / str(entry.attempt) / str(entry.round) / entry.node
        assert (folder / "0.safetensors").exists()

    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in history] == [0, 1, 2]
    assert all(0 <= line["accuracy"] <= 1 and line["n"] == 360 for line in history)
    check_property_batches(recording, TruthVault(run / "truth"))


def digits_with_property(path: Path) -> str:
    """The digits in a file, with a property: there is more ink above the middle than below."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype("float32") / 16
    high = images[:, :4].sum((1, 2)) > images[:, 4:].sum((1, 2))
    np.savez(path, x=images, y=labels, high=high.astype("int64"), allow_pickle=False)
    return f"npz(path={str(path)!r}, x='x', y='y', properties=('high',), test_fraction=0.2)"


def check_property_batches(recording: Recording, vault: TruthVault) -> None:
    """The victim's first round is of the property; no other round of an honest client is."""
    exchanges = [target.exchanges[0] for target in ThreatModel().observe(recording)]
    partition = {e.node: int(vault.defense_stats(e)["partition"]) for e in exchanges}
    active = max(partition, key=partition.__getitem__)
    for exchange in exchanges:
        if exchange.node != active:
            values = vault.samples([exchange]).properties["high"]
            assert len(values) == 8
            assert (values == int(partition[exchange.node] == 0 and exchange.round == 1)).all()
    check_second_head(recording, vault, active)


def check_second_head(recording: Recording, vault: TruthVault, node: str) -> None:
    """The active client's updates are those of a head that lives on, whatever process made them."""
    known = ThreatModel(own_node=node).observe(recording)
    own_updates = {target.exchanges[0].round: target.own_update for target in known}
    mine = [t.exchanges[0] for t in ThreatModel().observe(recording) if t.exchanges[0].node == node]
    assert node not in {target.exchanges[0].node for target in known}
    assert [exchange.round for exchange in mine] == [1, 2]
    memory = RecordDict()
    for exchange in mine:
        assert vault.defense_stats(exchange)["active_alpha"] == 0.5
        model = known[0].model()
        model.load_state_dict(dict(exchange.parameters))
        result = train_actively(
            model,
            known[0].task,
            vault.samples([exchange]),
            LocalTraining(lr=0.01, batch_size=8, order="sequential"),
            name="high",
            alpha=0.5,
            memory=memory,
            seed=derive_seed(0, CLIENTS - 1, HEAD),
            generator=torch.Generator(),
        )
        for name, update in (own_updates[exchange.round] or {}).items():
            expected = result.state[name] - exchange.parameters[name]
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.flower
def test_all_clients_failing_fails_the_run(tmp_path: Path, mark: str) -> None:
    app, run = assemble_app(tmp_path / "app"), tmp_path / "run"
    with (app / "clients" / "training.py").open("a") as file:
        file.write("def draw_batches(*_, **__):\n    raise ValueError('out of luck')\n")
    with pytest.raises(SimulationError) as failed:
        simulate({"dataset": "digits", "model": "mlp"}, out=run, app=app, clients=CLIENTS)
    error = str(failed.value)
    assert error.startswith("round 1: none of 4 clients returned an update; they report: ")
    assert error.count("out of luck") == 1
    assert "ray::" not in error
    assert str(run / "simulation.log") in error
    assert marked(mark) == set()


@pytest.mark.flower
def test_ctrl_c_ends_every_process(tmp_path: Path, mark: str) -> None:
    arguments = ("simulate", "--out", str(tmp_path / "run"), *SMALL, "--rounds", "1000")
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any("raylet" in name for name in names(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert marked(mark) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_silent_flower(number: signal.Signals, tmp_path: Path, mark: str) -> None:
    def signal_soon(line: str) -> None:
        Timer(0.3, os.kill, (os.getpid(), number)).start()

    link = SuperLink(tmp_path, dict(os.environ))
    link.work.mkdir()
    silent = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(30)"]
    start = time.monotonic()
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    try:
        with signals_raise(), pytest.raises(SystemExit) as ended:
            follow(link, silent, tmp_path / "log", signal_soon)
    finally:
        signal.signal(number, before)
    assert time.monotonic() - start < 15
    assert ended.value.code == 128 + number
    assert marked(mark) == set()


@pytest.mark.parametrize("reason", ["", "out of luck"])
def test_a_crash_in_the_log_of_an_earlier_attempt_is_not_this_ones(
    reason: str, tmp_path: Path
) -> None:
    link, crash = SuperLink(tmp_path, dict(os.environ)), "ERROR : An exception occurred !! "
    link.work.mkdir()
    (tmp_path / "log").write_text(f"{crash}long ago\n")
    lines = ["Successfully started run 7", crash + reason if reason else "INFO : fine"]
    said = follow(link, ["printf", r"%s\n", *lines], tmp_path / "log", lambda line: None)
    assert said == ("7", reason)


def test_a_ray_that_is_late_is_told_from_other_crashes(tmp_path: Path) -> None:
    link = SuperLink(tmp_path, dict(os.environ))
    link.work.mkdir()
    late = "Exception: The current node timed out during startup. This could happen because"
    lines = [
        "Successfully started run 7", late, "ERROR : An exception occurred !! Runtime crashed"
    ]  # fmt: skip
    said = follow(link, ["printf", r"%s\n", *lines], tmp_path / "log", lambda line: None)
    assert said == ("7", RAY_TIMEOUT)


def names(mark: str) -> list[str]:
    found = []
    for pid in marked(mark):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_text())
        except OSError:
            continue
    return found


def test_a_ray_address_that_nobody_answers_is_named() -> None:
    with pytest.raises(SimulationError, match=r"RAY_ADDRESS=127\.0\.0\.1:1 .*unset RAY_ADDRESS"):
        check_ray_address("127.0.0.1:1")
    with pytest.raises(SimulationError, match="RAY_ADDRESS=nonsense"):
        check_ray_address("nonsense")
    check_ray_address("")


def test_a_client_that_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_resources(2, 0.5, 2, 1)
    with pytest.raises(ComponentError, match="wants 3 cores, there are 2"):
        check_resources(3, 0.0, 2, 0)
    with pytest.raises(ComponentError, match=r"wants 0\.5 GPUs, there are 0"):
        check_resources(1, 0.5, 2, 0)


def test_an_assembled_app_holds_the_running_code(tmp_path: Path) -> None:
    app = assemble_app(tmp_path / "app")
    here = Path(__file__).resolve().parent.parent
    assert digest_of(app) == digest_of(here)
    assert (app / "fl_privacy" / "datasets" / "fashion_mini_train.json").exists()
    assert not list(app.rglob("__pycache__"))

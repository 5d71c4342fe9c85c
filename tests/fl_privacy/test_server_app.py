"""The ServerApp against an in-process grid: no Ray, no network."""

import json
import shutil
import stat
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from safetensors import safe_open
from safetensors.torch import load_file

from fl_privacy import server_app
from fl_privacy.code_digest import code_digest
from fl_privacy.component import ComponentError
from fl_privacy.datasets.digits import Digits
from fl_privacy.recording import Recording, RecordingError
from fl_privacy.recording_format import NOTHING
from fl_privacy.round_progress import INITIAL
from fl_privacy.run_folder import RunFolderError
from fl_privacy.settings import RunSettings, Scalar
from strategies import await_clients
from strategies.same_code import CodeMismatchError
from tests.strategies.in_process_grid import ClientError, InProcessGrid


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(await_clients, "SETTLED_SECONDS", 0.0)


class Client:
    """Adds a constant to every weight; node 13 always fails."""

    def __init__(self, amount: float, digest: str) -> None:
        self.amount, self.digest = amount, digest
        self.attempts = set[object]()

    def __call__(self, content: RecordDict, node: int) -> RecordDict:
        if node == 13:
            raise ClientError("out of luck")
        self.attempts.add(content.config_records["config"]["attempt"])
        state = content.array_records["arrays"].to_torch_state_dict()
        arrays = ArrayRecord({name: value + self.amount for name, value in state.items()})
        report = ConfigRecord({"partition-id": node, "code-digest": self.digest})
        metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
        return RecordDict({"arrays": arrays, "metrics": metrics, "fl-privacy": report})


def adding(amount: float, digest: str | None = None) -> Client:
    return Client(amount, digest or code_digest())


def run(
    out: Path,
    client: Callable[[RecordDict, int], RecordDict],
    changed: Mapping[str, Scalar] = MappingProxyType({}),
    *,
    nodes: tuple[int, ...] = (1, 2),
) -> None:
    settings = {"dataset": "digits", "model": "mlp(hidden=(4,))", "num-server-rounds": 2}
    config = RunSettings().model_dump(by_alias=True) | settings | {"out-dir": str(out), **changed}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    server_app.app(InProcessGrid(client, nodes), context)


def sent(folder: Path, attempt: int, round: int) -> dict[str, torch.Tensor]:
    recording = Recording(folder / "recording")
    entry = next(recording.entries(attempt=attempt, rounds={round}))
    return dict(recording.sent(entry))


def history(folder: Path) -> list[tuple[int, int]]:
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [(line["attempt"], line["round"]) for line in lines]


def test_a_run_records_every_reply_and_the_history(tmp_path: Path) -> None:
    client = adding(1.0)
    run(tmp_path, client, {"client-defense": "gaussian_noise(scale=1)"}, nodes=(1, 2, 13))
    entries = list(Recording(tmp_path / "recording").entries(status=None))
    assert sorted((e.round, e.node, e.ok) for e in entries) == [
        (round, node, node != "13") for round in (1, 2) for node in ("1", "13", "2")
    ]
    first, second = sent(tmp_path, 1, 1), sent(tmp_path, 1, 2)
    assert all(torch.allclose(second[name], first[name] + 1.0) for name in first)
    assert history(tmp_path) == [(1, 0), (1, 1), (1, 2)]
    assert client.attempts == {1}
    manifest = (tmp_path / "recording" / "manifest.json").read_text()
    assert "gaussian_noise" not in manifest
    assert code_digest() in manifest


def test_a_resumed_run_goes_on_from_the_last_aggregate(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0))
    client = adding(1.0)
    run(tmp_path, client, {"resume": True})
    first, again = sent(tmp_path, 1, 1), sent(tmp_path, 2, 1)
    assert all(torch.allclose(again[name], first[name] + 2.0) for name in first)
    assert history(tmp_path) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert client.attempts == {2}


def test_a_run_starts_from_the_parameters_that_another_kept(tmp_path: Path) -> None:
    run(tmp_path / "first", adding(1.0))
    kept = load_file(tmp_path / "first" / "model.safetensors")
    given: dict[str, Scalar] = {"initial-model": str(tmp_path / "first" / "model.safetensors")}
    run(tmp_path / "second", adding(1.0), given)
    first = sent(tmp_path / "second", 1, 1)
    assert kept.keys() == first.keys()
    assert all(torch.equal(kept[name], first[name]) for name in kept)
    config = Recording(tmp_path / "second" / "recording").manifest.run_config
    assert config["initial-model"] == given["initial-model"]
    with pytest.raises(RunFolderError, match="same model and task"):
        run(tmp_path / "third", adding(1.0), given | {"model": "mlp(hidden=(5,))"})
    with pytest.raises(RunFolderError, match="cannot be used"):
        run(tmp_path / "third", adding(1.0), {"initial-model": "/nowhere/model.safetensors"})


def test_another_strategy_does_not_resume_a_run(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0), {"strategy": "fedmedian"})
    with pytest.raises(RecordingError, match=r"holds strategy fedmedian, .* has fedavg; repeat"):
        run(tmp_path, adding(1.0), {"resume": True})


def test_a_resumed_run_does_not_go_back_to_the_last_recorded_round(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0), {"record-rounds": "1", "num-server-rounds": 3})
    run(tmp_path, adding(1.0), {"resume": True, "record-rounds": "1"})
    first, again = sent(tmp_path, 1, 1), sent(tmp_path, 2, 1)
    assert all(torch.allclose(again[name], first[name] + 3.0) for name in first)


def test_a_run_that_kept_no_model_resumes_from_the_last_one_sent(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0))
    (tmp_path / "model.safetensors").unlink()
    run(tmp_path, adding(1.0), {"resume": True})
    last, again = sent(tmp_path, 1, 2), sent(tmp_path, 2, 1)
    assert all(torch.equal(again[name], last[name]) for name in last)


def test_a_damaged_model_is_named_with_the_remedy(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0))
    model = tmp_path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"model.safetensors: damaged .*; remove it to resume"):
        run(tmp_path, adding(1.0), {"resume": True})


def test_the_kept_model_says_of_which_round_it_is(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0))
    run(tmp_path, adding(1.0), {"resume": True, "num-server-rounds": 3})
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"attempt": "2", "round": "3"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "history.jsonl").stat().st_mode) == 0o600


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="holds a recording already"):
        run(tmp_path, adding(1.0))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_all_clients_failing_names_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        run(tmp_path, adding(1.0), {"min-clients": 1}, nodes=(13,))
    entries = list(Recording(tmp_path / "recording").entries(status=None))
    assert [entry.ok for entry in entries] == [False]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_recorded_nothing_is_taken_up_with_one_history(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(InProcessGrid, "send_and_receive", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, adding(1.0))
    assert history(tmp_path) == [(1, 0)]
    run(tmp_path, adding(1.0), {"resume": resume})
    assert history(tmp_path) == [(1, 0), (1, 1), (1, 2)]
    assert stat.S_IMODE((tmp_path / "history.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize(("rounds", "marked"), [("", [2, 3]), ("1,2", [2])])
def test_a_completed_round_that_the_recording_lost_is_marked_when_the_run_resumes(
    rounds: str, marked: list[int], tmp_path: Path
) -> None:
    run(tmp_path, adding(1.0), {"num-server-rounds": 3, "record-rounds": rounds})
    index = tmp_path / "recording/index/000000.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:2]))
    for round in (2, 3):
        shutil.rmtree(tmp_path / f"recording/updates/1/{round}", ignore_errors=True)
    run(tmp_path, adding(1.0), {"num-server-rounds": 1, "record-rounds": rounds, "resume": True})
    failed = Recording(tmp_path / "recording").entries(status="error")
    assert [(e.attempt, e.round, e.status) for e in failed] == [(1, r, NOTHING) for r in marked]
    assert history(tmp_path) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]


@pytest.mark.parametrize(("wanted", "scored"), [(7, 7), (0, 360), (2000, 360)])
def test_a_seeded_choice_of_test_images_scores_every_round(
    wanted: int,
    scored: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(getLogger("flwr"), "propagate", True)
    caplog.set_level("INFO", "flwr")
    run(tmp_path, adding(1.0), {"eval-samples": wanted})
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [scored] * 3
    assert caplog.text.count(f"{INITIAL}: {scored} test samples") == 1


def test_the_test_images_follow_the_seed_alone() -> None:
    def chosen(seed: int) -> torch.Tensor:
        return server_app.scored_samples(Digits(), RunSettings(seed=seed, eval_samples=7)).inputs

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))


def test_a_cut_off_history_is_mended_and_a_damaged_one_named(tmp_path: Path) -> None:
    run(tmp_path, adding(1.0))
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text() + '{"attempt": 1, "rou')
    run(tmp_path, adding(1.0), {"resume": True, "num-server-rounds": 1})
    assert history(tmp_path) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(RunFolderError, match=r"history.jsonl: line 1 is damaged"):
        run(tmp_path, adding(1.0), {"resume": True})


def test_other_code_on_all_clients_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(CodeMismatchError, match=r"client \d runs other code \(digest beef"):
        run(tmp_path, adding(1.0, digest="beef" * 16), nodes=(1, 2, 13))


def test_one_client_with_other_code_is_recorded_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, liar = adding(1.0), adding(100.0, digest="\x1b[2Jbeef")
    monkeypatch.setattr(getLogger("flwr"), "propagate", True)
    run(tmp_path, lambda content, node: (liar if node == 2 else honest)(content, node))
    first, second = sent(tmp_path, 1, 1), sent(tmp_path, 1, 2)
    assert all(torch.allclose(second[name], first[name] + 1.0) for name in first)
    assert len(list(Recording(tmp_path / "recording").entries())) == 4
    assert "client 2 runs other code (digest [2Jbeef)" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "nope"}, "no strategy 'nope'; installed: bulyan, fedadagrad"),
        ({"strategy": "krum(x=1)"}, r"krum: no setting 'x'. Settings of krum: num_malicious"),
        ({"strategy": "qfedavg"}, "needs 'client_learning_rate'"),
        ({"strategy": "fedxgbbagging"}, "no strategy"),
        ({"model": "nope"}, "no model 'nope'"),
        ({"dataset": "nope"}, "no dataset 'nope'"),
    ],
)
def test_unknown_components_are_refused_before_anything_is_recorded(
    changes: dict[str, Scalar], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ComponentError, match=message):
        run(tmp_path, adding(1.0), changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "strategy",
    [
        "fedadam",
        "fedavgm(server_momentum=0.5)",
        "fedmedian",
        "fedprox(proximal_mu=0.1)",
        "fedtrimmedavg(beta=0.3)",
        "krum(num_malicious_nodes=1)",
        "qfedavg(client_learning_rate=0.1)",
    ],
)
def test_flower_strategies_run_by_name(strategy: str, tmp_path: Path) -> None:
    run(tmp_path, adding(0.1), {"strategy": strategy}, nodes=(1, 2, 3, 4))
    assert len(list(Recording(tmp_path / "recording").entries())) == 8

"""A client's account of its privacy: on disk before anything leaves, and never guessed."""

import json
import math
import os
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

from clients import privacy_ledger
from clients.accounting import AccountingError, epsilon_of
from clients.privacy_ledger import BudgetError, charge
from fl_privacy import client_app
from fl_privacy.component import ComponentError, create
from fl_privacy.privacy_spent import FILE, NoisySteps, SpentError, read_spent
from fl_privacy.settings import RunSettings
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange

ONE = NoisySteps(noise_multiplier=1.0, sample_rate=0.1, count=5)
OTHER = NoisySteps(noise_multiplier=2.0, sample_rate=0.1, count=3)
DELTA = 1e-5


def pay(folder: Path, more: NoisySteps = ONE, budget: float | None = None) -> float:
    spent = charge(folder, more, delta=DELTA, accountant="rdp", budget=budget)
    assert spent.epsilon is not None
    return spent.epsilon


def test_participations_add_up_over_restarts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "0"
    for more in (ONE, OTHER, ONE):
        last = pay(folder, more)
    spent = read_spent(folder / FILE)
    assert spent.participations == 3
    assert spent.steps == (ONE.model_copy(update={"count": 10}), OTHER)
    assert last == spent.epsilon == epsilon_of(spent.steps, DELTA, "rdp")
    assert (folder / FILE).stat().st_mode & 0o077 == 0


def test_without_noise_the_account_says_that_nothing_is_guaranteed(tmp_path: Path) -> None:
    none = ONE.model_copy(update={"noise_multiplier": 0.0})
    assert charge(tmp_path, none, delta=DELTA).epsilon is None
    assert charge(tmp_path, ONE, delta=DELTA).epsilon is None
    with pytest.raises(BudgetError, match="inf"):
        charge(tmp_path, ONE, delta=DELTA, budget=100.0)


def test_the_budget_is_never_exceeded_and_a_refusal_costs_nothing(tmp_path: Path) -> None:
    budget = epsilon_of([ONE.model_copy(update={"count": 10})], DELTA, "rdp")
    assert pay(tmp_path, budget=budget) < pay(tmp_path, budget=budget) == budget
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(BudgetError, match=r"budget is .* 2 participations are counted already"):
        pay(tmp_path, budget=budget)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "x": 1})),
        lambda path: path.write_text(path.read_text().replace('version": 1', 'version": 2')),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["torn", "empty", "unknown key", "other version", "unreadable"],
)
def test_an_account_that_cannot_be_read_stops_training(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    pay(tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(SpentError, match=r"privacy\.json: cannot be read .*restore the file"):
        pay(tmp_path)


def test_a_folder_that_cannot_be_written_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AccountingError, match="set client-state-dir to a folder"):
        pay(tmp_path / "file" / "0")

    def full(files: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(privacy_ledger, "write_atomically", full)
    with pytest.raises(AccountingError, match="No space left on device"):
        pay(tmp_path)


def forked(work: Callable[[], object]) -> int:
    """Start ``work`` in a process of its own; it imports nothing again."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:  # noqa: BLE001
        os._exit(1)
    os._exit(0)


def test_processes_that_share_a_folder_lose_no_participation(tmp_path: Path) -> None:
    children = [forked(lambda: [pay(tmp_path) for _ in range(6)]) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    spent = read_spent(tmp_path / FILE)
    assert spent.participations == 12
    assert sum(part.count for part in spent.steps) == 60


def test_a_process_that_waits_too_long_for_the_account_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy_ledger, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / f"{FILE}.lock"), pytest.raises(AccountingError, match="of its own"):
        pay(tmp_path)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("when", "counted"), [("during", 1), ("after", 2)])
def test_a_kill_counts_too_much_or_nothing_has_left(
    tmp_path: Path, when: str, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the account is written: nothing was trained; after it: counted, not sent."""
    pay(tmp_path)
    with monkeypatch.context() as patch:
        if when == "during":
            patch.setattr(Path, "replace", die)
        child = forked(lambda: die(pay(tmp_path)))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert read_spent(tmp_path / FILE).participations == counted
    pay(tmp_path)
    assert read_spent(tmp_path / FILE).participations == counted + 1


RUN = {
    **RunSettings().model_dump(by_alias=True),
    "dataset": "digits",
    "model": "mlp(hidden=(5,))",
    "batch-size": 10,
    "client-defense": "dp_sgd(noise_multiplier=1.0, accountant='rdp')",
}


@pytest.fixture
def train(send: Callable[..., Message], node: Callable[..., Context]) -> Callable[..., Message]:
    """``train(out, changes, **node_config)``: the reply of one client."""
    task = create("datasets", "digits").task()
    state = create("models", str(RUN["model"])).build(task, seed=0).state_dict()

    def run(changes: dict[str, object], round: int = 1, **own: int | str) -> Message:
        config = ConfigRecord({"server-round": round})
        arrays = ArrayRecord(OrderedDict(state))
        message = send(RecordDict({"arrays": arrays, "config": config}))
        return client_app.app(message, node({**RUN, **changes}, **own))

    return run


def test_a_client_charges_its_own_account_and_keeps_its_loss(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    changes = {"out-dir": str(tmp_path), "audit": True}
    replies = [train(changes, round=r, partition_id=p) for r in (1, 2) for p in (0, 3)]
    spent = read_spent(tmp_path / "clients" / "3" / FILE)
    n = len(client_app.partition_indices("digits", "iid", 3, 4, 0))
    expected = NoisySteps(noise_multiplier=1.0, sample_rate=10 / n, count=2)
    assert (spent.participations, spent.steps) == (2, (expected,))
    assert spent.epsilon == epsilon_of([expected], DELTA, "rdp")
    for reply in replies:
        assert math.isnan(float(str(reply.content.metric_records["metrics"]["loss"])))
        assert "epsilon" not in reply.content.config_records["fl-privacy"]
    kept = TruthVault(tmp_path / "truth").defense_stats(
        Exchange(1, 2, "7", None, "", "", {}, {}, {}, {})
    )
    assert kept["epsilon"] == spent.epsilon
    assert kept["delta"] == DELTA
    assert kept["noise_multiplier"] == 1.0
    assert kept["samples"] == n


def test_a_client_tells_its_epsilon_only_if_it_wants(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    reply = train({"out-dir": str(tmp_path), "client-report-epsilon": True})
    told = reply.content.config_records["fl-privacy"]
    spent = read_spent(tmp_path / "clients" / "0" / FILE)
    assert (told["epsilon"], told["delta"]) == (spent.epsilon, DELTA)


def test_a_client_takes_part_no_more_when_its_budget_is_spent(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    """Noise for two rounds: two fit exactly, whichever attempts they belong to."""
    defense = "dp_sgd(epsilon=2.0, accountant='rdp')"
    changes = {"client-defense": defense, "out-dir": str(tmp_path), "num-server-rounds": 2}
    train(changes, round=1)
    train(changes, round=2)
    with pytest.raises(BudgetError, match="does not allow another participation"):
        train(changes, round=1)
    spent = read_spent(tmp_path / "clients" / "0" / FILE)
    assert spent.participations == 2
    assert spent.epsilon is not None
    assert 1.9 < spent.epsilon <= 2.0


def test_the_account_is_on_disk_before_training_begins(
    tmp_path: Path, train: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client_app, "local_train", crash)
    with pytest.raises(KeyboardInterrupt):
        train({"out-dir": str(tmp_path)})
    assert read_spent(tmp_path / "clients" / "0" / FILE).participations == 1


def test_a_node_with_its_own_defense_keeps_its_own_account(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    """The server can neither turn it off nor say where the account lies."""
    own = {"client_defense": str(RUN["client-defense"])}
    server: dict[str, object] = {
        "out-dir": str(tmp_path / "s"),
        "client-state-dir": str(tmp_path / "s"),
    }
    server |= {"client-defended-share": 0.0}
    with pytest.raises(ComponentError, match=r"set client-state-dir .*--node-config"):
        train(server, **own)
    train(server, **own, client_state_dir=str(tmp_path / "mine"))
    assert read_spent(tmp_path / "mine" / "0" / FILE).participations == 1
    assert not (tmp_path / "s").exists()


def test_the_batches_of_a_nodes_own_dp_sgd_are_not_drawn_from_the_runs_seed(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    def sizes(**own: str) -> set[int]:
        found = set()
        for i in range(6):
            out = tmp_path / f"{len(own)}" / str(i)
            train({"out-dir": str(out), "audit": True, "client-state-dir": str(out)}, **own)
            step = next((out / "truth").rglob("0.safetensors"))
            found.add(hash(step.read_bytes()))
        return found

    assert len(sizes()) == 1
    own = {"client_defense": str(RUN["client-defense"]), "client_state_dir": str(tmp_path / "own")}
    assert len(sizes(**own)) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "client-state-dir to an absolute path"),
        ({"client-state-dir": "state"}, "must be absolute, got 'state'"),
        ({"client-state-dir": "/x", "strategy": "qfedavg(client_learning_rate=0.1)"}, "qfedavg"),
    ],
)
def test_a_client_that_cannot_keep_the_guarantee_does_not_train(
    train: Callable[..., Message], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ComponentError, match=message):
        train(changes)
    assert not os.path.exists("state")  # noqa: PTH110


class Counting(nn.Module):
    """A network that writes into a buffer what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(64, 10)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + inputs.detach().sum()
        logits: Tensor = self.dense(inputs.flatten(1))
        return logits


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(inputs.flatten(1)))
        return logits[:, :10]


@pytest.mark.parametrize("defense", ["gaussian_noise(scale=1.0)", str(RUN["client-defense"])])
def test_a_weight_with_two_names_leaves_the_client_defended_under_both(
    defense: str,
    send: Callable[..., Message],
    node: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = Tied()
    sent = {n: v.clone() for n, v in model.state_dict().items()}
    monkeypatch.setattr(client_app, "received_model", lambda *_: ("arrays", model, sent))
    message = send(RecordDict({"config": ConfigRecord({"server-round": 1})}))
    config = {**RUN, "client-defense": defense, "client-state-dir": str(tmp_path)}
    reply = client_app.app(message, node(config))
    arrays = reply.content.array_records["arrays"].to_torch_state_dict()
    assert torch.equal(arrays["first.weight"], arrays["second.weight"])
    assert float((arrays["first.weight"] - sent["first.weight"]).abs().min()) > 0


def test_what_a_forward_pass_writes_into_buffers_stays_with_the_client(
    send: Callable[..., Message],
    node: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def received(message: Message, *_: object) -> tuple[str, nn.Module, dict[str, Tensor]]:
        model = Counting()
        return "arrays", model, {n: v.clone() for n, v in model.state_dict().items()}

    monkeypatch.setattr(client_app, "received_model", received)
    message = send(RecordDict({"config": ConfigRecord({"server-round": 1})}))

    def seen(defense: str) -> float:
        config = {**RUN, "client-defense": defense, "client-state-dir": str(tmp_path)}
        reply = client_app.app(message, node(config))
        arrays = reply.content.array_records["arrays"].to_torch_state_dict()
        return float(arrays["seen"])

    assert seen("") != 0
    assert seen(RUN["client-defense"]) == 0

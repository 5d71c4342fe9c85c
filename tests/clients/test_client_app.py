"""The Flower client as a whole, in this process, on messages made by hand."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from fl_privacy.client_app import app, open_dataset, partition_indices
from fl_privacy.code_digest import code_digest
from fl_privacy.component import ComponentError, create
from fl_privacy.settings import RunSettings
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange

Send = Callable[..., Message]
Node = Callable[..., Context]
State = dict[str, Tensor]
Run = dict[str, bool | int | float | str]

RUN: Run = {
    **RunSettings().model_dump(by_alias=True),
    "dataset": "digits",
    "model": "mlp(hidden=(5,))",
    "lr": 0.5,
    "batch-size": 3,
}


def start(run: Run = RUN) -> State:
    task = create("datasets", str(run["dataset"])).task()
    state: State = create("models", str(run["model"])).build(task, seed=0).state_dict()
    return state


def content(state: State, **config: int) -> RecordDict:
    settings: dict[str, int | float | str | bytes | bool] = {"server-round": 1}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    arrays = ArrayRecord(OrderedDict(state))
    return RecordDict({"sent": arrays, "config": ConfigRecord(dict(settings))})


def returned(reply: Message) -> State:
    return dict(reply.content.array_records["sent"].to_torch_state_dict())


@pytest.fixture
def train(send: Send, node: Node) -> Callable[..., Message]:
    """``train(changes of RUN, message settings, **node_config)``: the reply of one client."""

    def run(
        changes: Run | None = None, round: int = 1, attempt: int = 1, **own: int | str
    ) -> Message:
        settings = RUN | (changes or {})
        message = send(content(start(settings), server_round=round, attempt=attempt))
        return app(message, node(settings, **own))

    return run


def test_the_reply_is_what_every_strategy_expects(train: Callable[..., Message]) -> None:
    reply = train(partition_id=2)
    assert list(reply.content.array_records) == ["sent"]
    assert list(returned(reply)) == list(start())
    (metrics,) = reply.content.metric_records.values()
    assert set(metrics) == {"num-examples", "loss"}
    assert metrics["num-examples"] == 3
    report = reply.content.config_records["fl-privacy"]
    assert dict(report) == {"partition-id": 2, "code-digest": code_digest()}


def kept(round: int = 1, attempt: int = 1) -> Exchange:
    return Exchange(
        attempt=attempt,
        round=round,
        node="7",
        num_examples=None,
        digest="",
        global_digest="",
        parameters={},
        buffers={},
        update={},
        returned_buffers={},
    )


def test_an_audit_keeps_the_very_batch_behind_the_update(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    """Minus lr times the gradient on the kept batch is the update that went out."""
    reply = train({"audit": True, "out-dir": str(tmp_path)}, round=4, attempt=2)
    vault = TruthVault(tmp_path / "truth")
    (batch,) = vault.steps(kept(round=4, attempt=2))
    task = create("datasets", "digits").task()
    model = create("models", str(RUN["model"])).build(task, seed=0)
    outputs = model(task.normalize(batch.inputs))
    loss = torch.nn.functional.cross_entropy(outputs, batch.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        update = returned(reply)[name] - parameter.detach()
        torch.testing.assert_close(update, -0.5 * gradient, rtol=0, atol=1e-6)


def test_the_batch_is_from_the_clients_own_partition(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    changes: Run = {"audit": True, "out-dir": str(tmp_path), "algorithm": "fedavg"}
    reply = train(changes, partition_id=1)
    whole = TruthVault(tmp_path / "truth").samples([kept()])
    own = partition_indices("digits", "iid", 1, 4, 0)
    expected = create("datasets", "digits").load("train", own)
    assert len(whole) == len(own)
    assert sorted(whole.inputs.flatten(1).tolist()) == sorted(expected.inputs.flatten(1).tolist())
    assert reply.content.metric_records["metrics"]["num-examples"] == len(own)


def test_a_nodes_own_audit_folder_keeps_its_truth_from_the_servers(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    run, own = tmp_path / "server" / "first", tmp_path / "node-0"
    train({"audit": True, "out-dir": str(run)}, client_audit_dir=str(own))
    assert not run.exists()
    assert len(TruthVault(own / "first" / "truth").steps(kept())) == 1


def test_what_a_run_of_the_same_name_left_is_no_truth_of_this_one(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    changes: Run = {"audit": True, "out-dir": str(tmp_path), "algorithm": "fedavg"}
    train({**changes, "local-epochs": 3})
    before = len(TruthVault(tmp_path / "truth").steps(kept()))
    train({**changes, "local-epochs": 1})
    assert len(TruthVault(tmp_path / "truth").steps(kept())) == before // 3


def npz_of(path: Path, n: int) -> str:
    arrays = {
        f"{name}_{split}": values
        for split in ("train", "test")
        for name, values in (
            ("x", (np.arange(64 * n) % 256).reshape(n, 8, 8).astype(np.uint8)),
            ("y", np.arange(n) % 10),
        )
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return f"npz(path={str(path)!r})"


def test_a_node_trains_on_all_of_a_dataset_of_its_own_normalized_as_the_server_says(
    tmp_path: Path, send: Send, node: Node
) -> None:
    own = npz_of(tmp_path / "own.npz", 20)
    settings = RUN | {"audit": True, "out-dir": str(tmp_path / "run"), "batch-size": 20}
    told = content(start(settings))
    told.config_records["config"]["input-mean"] = [0.25]
    told.config_records["config"]["input-std"] = [0.5]
    reply = app(send(told), node(settings, partition_id=3, client_dataset=own))
    metrics = reply.content.metric_records["metrics"]
    assert metrics["num-examples"] == 20
    assert reply.content.config_records["fl-privacy"]["partition-id"] == 3
    (batch,) = TruthVault(tmp_path / "run" / "truth").steps(kept())
    model = create("models", str(RUN["model"])).build(create("datasets", "digits").task(), seed=0)
    loss = torch.nn.functional.cross_entropy(model((batch.inputs - 0.25) / 0.5), batch.labels)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_without_an_audit_nothing_is_written(tmp_path: Path, train: Callable[..., Message]) -> None:
    train({"out-dir": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_a_round_can_be_repeated_and_differs_from_others(train: Callable[..., Message]) -> None:
    weight = "dense1.weight"
    first, again = returned(train())[weight], returned(train())[weight]
    assert torch.equal(first, again)
    others = (train(round=2), train(attempt=2), train(partition_id=1), train({"seed": 1}))
    assert all(not torch.equal(first, returned(other)[weight]) for other in others)


NOISE = "gaussian_noise(scale=0.01)"


def test_the_share_of_defending_clients_begins_at_partition_zero(
    tmp_path: Path, train: Callable[..., Message]
) -> None:
    """A share of one half of four clients is partitions 0 and 1."""
    for client in range(4):
        plain = returned(train(partition_id=client))
        changes: Run = {
            "client-defense": NOISE,
            "client-defended-share": 0.5,
            "audit": True,
            "out-dir": str(tmp_path / str(client)),
        }
        reply = train(changes, partition_id=client)
        equal = torch.equal(returned(reply)["dense1.weight"], plain["dense1.weight"])
        assert equal == (client >= 2)
        vault = TruthVault(tmp_path / str(client) / "truth")
        assert vault.defense(kept()) == (NOISE if client < 2 else "")


def test_a_resumed_run_draws_other_noise(train: Callable[..., Message]) -> None:
    """The same batch (all samples, in order) twice: what differs is the noise."""
    whole: Run = {"order": "sequential", "client-defense": NOISE}
    first, resumed = (returned(train(whole, attempt=a))["dense1.weight"] for a in (1, 2))
    assert not torch.equal(first, resumed)


def test_the_nodes_own_defense_takes_precedence(train: Callable[..., Message]) -> None:
    """Clipping to a tiny norm leaves an update of at most lr times that norm."""
    own = "per_sample_clipping(max_norm=1e-3)"
    state = returned(train({"client-defense": NOISE}, client_defense=own))
    squares = [(value - start()[name]).double().square().sum() for name, value in state.items()]
    assert 0 < float(torch.stack(squares).sum().sqrt()) <= 0.5e-3 * 1.001


def test_a_server_that_knows_the_seed_cannot_repeat_the_nodes_own_noise(
    train: Callable[..., Message],
) -> None:
    weight = "dense1.weight"
    prescribed = [returned(train({"client-defense": NOISE}))[weight] for _ in range(2)]
    own = [returned(train(client_defense=NOISE))[weight] for _ in range(2)]
    assert torch.equal(*prescribed)
    assert not torch.equal(*own)


def test_batch_norm_statistics_come_back_undefended(train: Callable[..., Message]) -> None:
    changes: Run = {"model": "convnet64", "dataset": "fashion-mini", "batch-size": 2}
    plain, noisy = returned(train(changes)), returned(train(changes | {"client-defense": NOISE}))
    for name, value in plain.items():
        parameter = name.endswith((".weight", ".bias"))
        assert torch.equal(value, noisy[name]) != parameter
    assert plain["features.bn1.num_batches_tracked"].dtype == torch.int64


def test_buffers_that_came_back_as_floats_are_taken(send: Send, node: Node) -> None:
    """FedAvg averages integer buffers into float64."""
    run = RUN | {"model": "convnet64", "dataset": "fashion-mini"}
    state = start(run)
    state["features.bn1.num_batches_tracked"] = torch.tensor(3.0, dtype=torch.float64)
    reply = app(send(content(state)), node(run))
    assert int(returned(reply)["features.bn1.num_batches_tracked"]) == 4


def test_evaluation_shares_out_the_test_split(send: Send, node: Node) -> None:
    counts = []
    for client in range(4):
        context = node(RUN, partition_id=client)
        reply = app(send(content(start()), kind="evaluate"), context)
        metrics = reply.content.metric_records["metrics"]
        assert 0 <= float(str(metrics["accuracy"])) <= 1
        counts.append(metrics["num-examples"])
    assert counts == [90] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "imagenet"}, "no dataset 'imagenet'; installed: adult, celeba"),
        ({"client-defense": "nothing"}, "no defense 'nothing'"),
        ({"learning-rate": 1.0}, "learning-rate"),
        ({"audit": True, "out-dir": "runs"}, "absolute out-dir, got 'runs'"),
        (
            {"audit": True, "out-dir": "/runs/x", "client-audit-dir": "own"},
            "client-audit-dir must be absolute, got 'own'",
        ),
        ({"audit": True, "out-dir": "/runs/..", "client-audit-dir": "/own"}, "absolute out-dir"),
    ],
)
def test_wrong_settings_are_refused(
    train: Callable[..., Message], changes: Run, message: str
) -> None:
    with pytest.raises(ComponentError, match=message):
        train(changes)


def test_a_query_is_answered_with_partition_and_code(send: Send, node: Node) -> None:
    reply = app(send(RecordDict(), kind="query"), node(RUN, partition_id=3))
    told = reply.content.config_records["fl-privacy"]
    assert dict(told) == {"partition-id": 3, "code-digest": code_digest()}
    assert not reply.content.array_records


def test_a_node_without_a_partition_is_told_how_to_get_one(send: Send, node: Node) -> None:
    context = node(RUN)
    context.node_config.clear()
    with pytest.raises(ComponentError, match=r'num-partitions, partition-id.*--node-config "'):
        app(send(content(start())), context)


def test_a_message_without_a_round_is_refused(send: Send, node: Node) -> None:
    message = send(RecordDict({"sent": ArrayRecord(OrderedDict(start()))}))
    with pytest.raises(ComponentError, match="server-round"):
        app(message, node(RUN))


def test_a_proximal_term_is_refused_rather_than_ignored(send: Send, node: Node) -> None:
    asked = content(start())
    asked.config_records["config"]["proximal-mu"] = 0.1
    with pytest.raises(ComponentError, match=r"proximal-mu 0\.1.*another strategy"):
        app(send(asked), node(RUN))


def test_arrays_of_another_model_are_refused_by_name(send: Send, node: Node) -> None:
    message = send(content(start(RUN | {"model": "mlp(hidden=(6,))"})))
    with pytest.raises(ValueError, match=r"(?s)fit mlp\(hidden=\(5,\)\).*dense1\.weight"):
        app(message, node(RUN))


def test_a_process_opens_a_dataset_once() -> None:
    assert open_dataset("digits") is open_dataset("digits")

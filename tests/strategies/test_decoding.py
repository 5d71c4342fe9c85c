"""Decoding: sparse replies count like the dense ones they stand for, and are kept as received."""

from __future__ import annotations

import gc
import inspect
import random
from collections import OrderedDict
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from safetensors.numpy import save
from torch import nn

from clients.encoding import sparse_if_smaller
from fl_privacy.exchanges import ExchangeReader
from fl_privacy.recording import Manifest, Recording, RecordingError, RecordingWriter
from fl_privacy.sparse import ARRAY
from strategies.decoding import Decoding
from strategies.grid import RecordingGrid
from strategies.recording import RecordingStrategy
from strategies.require_replies import RequireReplies
from strategies.wrapper import StrategyWrapper
from tests.strategies.flower_strategies import made
from tests.strategies.in_process_grid import Client, InProcessGrid, round_in

NODES = list(range(101, 109))
N = len(NODES)
MANIFEST = Manifest(created="2025-01-01T00:00:00Z")


def offered() -> list[str]:
    """Every Flower strategy that aggregates weights, DP wrappers included."""
    return sorted(
        name
        for name in flower.__all__
        if issubclass(getattr(flower, name), Strategy)
        and not inspect.isabstract(getattr(flower, name))
        and "Xgb" not in name
    )


def model() -> nn.Module:
    """Enough entries that leaving most of them out pays, and statistics that are none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 10))


def initial(counter: bool = True) -> ArrayRecord:
    state = model().state_dict().items()
    kept = OrderedDict((n, t) for n, t in state if counter or "num_batches" not in n)
    return ArrayRecord(kept)


def sparse_client(encoded: bool) -> Client:
    """Changes a tenth of the entries, by node and round; the count comes back as an integer."""

    def client(content: RecordDict, node: int) -> RecordDict:
        rng = np.random.default_rng([node, round_in(content)])
        sent = next(iter(content.array_records.values()))
        arrays = {}
        for name, array in sent.items():
            value = array.numpy()
            changed = rng.random(value.shape) < 0.1
            arrays[name] = np.where(changed, value + rng.normal(size=value.shape), value)
            arrays[name] = arrays[name].astype("int64" if "num_batches" in name else "float32")
        returned = ArrayRecord({name: Array(value) for name, value in arrays.items()})
        metrics = MetricRecord({"num-examples": node % 5 + 1, "norm_bit": node % 2})
        metrics["train_loss"] = rng.uniform()
        reply = sparse_if_smaller(sent, returned) if encoded else returned
        return RecordDict({"arrays": reply, "metrics": metrics})

    return client


def run(
    strategy: Strategy, client: Client, rounds: int = 3, start: ArrayRecord | None = None
) -> Result:
    """A federation from fixed seeds (Flower draws from the global generators)."""
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    grid = InProcessGrid(client, NODES)
    return strategy.start(grid, start or initial(), num_rounds=rounds)


def bits(result: Result) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: (v.dtype, tuple(v.shape), v.data) for k, v in result.arrays.items()}


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Bulyan and QFedAvg call ``gc.collect`` for each reply: spare it what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", offered())
def test_sparse_replies_give_the_same_aggregate_bit_for_bit(name: str) -> None:
    start = initial(counter=name != "QFedAvg")  # which takes no integers
    dense = run(made(name, clients=N), sparse_client(encoded=False), start=start)
    sparse = run(Decoding(made(name, clients=N)), sparse_client(encoded=True), start=start)
    assert bits(sparse) == bits(dense)
    assert {r: dict(m) for r, m in sparse.train_metrics_clientapp.items()} == {
        r: dict(m) for r, m in dense.train_metrics_clientapp.items()
    }


def recorded(folder: Path, *, encoded: bool) -> Recording:
    with RecordingWriter.open(folder, MANIFEST) as writer:
        inner = Decoding(RequireReplies(FedAvg()))
        run(RecordingStrategy(inner, writer, model=model()), sparse_client(encoded))
    return Recording(folder)


def test_a_sparse_recording_holds_what_came_and_reads_like_a_dense_one(tmp_path: Path) -> None:
    dense = recorded(tmp_path / "dense", encoded=False)
    sparse = recorded(tmp_path / "sparse", encoded=True)
    reader, other = (ExchangeReader(recording, model()) for recording in (dense, sparse))
    pairs = list(zip(dense.entries(), sparse.entries(), strict=True))
    assert len(pairs) == 3 * N
    for entry, encoded in pairs:
        assert (entry.payload, encoded.payload) == ("weights", "sparse-update")
        assert encoded.bytes < entry.bytes / 2
        assert dense.returned(entry).keys() == sparse.returned(encoded).keys()
        for name, value in dense.returned(entry).items():
            got = sparse.returned(encoded)[name]
            assert (got.dtype, got.shape) == (value.dtype, value.shape)
            assert got.numpy().tobytes() == value.numpy().tobytes()
        expected, found = reader.exchange(entry), other.exchange(encoded)
        assert not found.flaw
        assert found.num_examples == expected.num_examples
        assert list(found.update) == list(expected.update)
        assert all(torch.equal(found.update[n], u) for n, u in expected.update.items())
        for name, buffer in expected.returned_buffers.items():
            assert torch.equal(found.returned_buffers[name], buffer)
    assert sparse.verify() == []
    schemas = list((tmp_path / "sparse" / "schemas").iterdir())
    assert len(schemas) <= 2  # not one for each size of an encoded reply


def test_a_sparse_reply_that_a_kill_left_unlisted_is_adopted(tmp_path: Path) -> None:
    recording = recorded(tmp_path / "r", encoded=True)
    last = list(recording.entries())[-1]
    index = tmp_path / "r" / "index" / "000000.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:-1]))
    RecordingWriter.open(tmp_path / "r", MANIFEST, resume=True).close()
    assert list(Recording(tmp_path / "r").entries())[-1] == last


class Listening(StrategyWrapper):
    """Keeps the replies it gets."""

    heard: list[Message]

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        self.heard = list(replies)
        return super().aggregate_train(server_round, self.heard)


def test_dense_replies_pass_untouched() -> None:
    outer, inner = Listening(FedAvg()), Listening(FedAvg())
    outer.strategy = Decoding(inner)
    run(outer, sparse_client(encoded=False), rounds=1)
    assert len(inner.heard) == N
    assert all(a is b for a, b in zip(outer.heard, inner.heard, strict=True))


def test_dense_and_sparse_clients_go_together() -> None:
    def mixed(content: RecordDict, node: int) -> RecordDict:
        return sparse_client(encoded=node % 2 == 0)(content, node)

    dense = run(FedAvg(), sparse_client(encoded=False))
    assert bits(run(Decoding(FedAvg()), mixed)) == bits(dense)


def malformed(data: bytes, *bad: int) -> Client:
    """Sends ``data`` as an encoded update from the nodes ``bad``."""

    def client(content: RecordDict, node: int) -> RecordDict:
        reply = sparse_client(encoded=True)(content, node)
        if node in bad:
            reply["arrays"] = ArrayRecord({ARRAY: Array(np.frombuffer(data, dtype=np.uint8))})
        return reply

    return client


def without(client: Client, *absent: int) -> Client:
    def some(content: RecordDict, node: int) -> RecordDict:
        reply = client(content, node)
        if node in absent:
            # FedAvg gives it no weight
            reply.metric_records["metrics"]["num-examples"] = 0
        return reply

    return some


def test_a_malformed_reply_fails_alone_and_is_recorded(tmp_path: Path) -> None:
    inner = Listening(FedAvg(fraction_evaluate=0))
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        strategy = RecordingStrategy(Decoding(inner), writer, model=model())
        got = run(strategy, malformed(b"nonsense", NODES[3]), rounds=1)
    (failed,) = (reply for reply in inner.heard if reply.has_error())
    assert failed.metadata.src_node_id == NODES[3]
    reason = str(failed.error.reason)
    assert reason.startswith("the sparse update cannot be decoded: not a safetensors file")
    others = run(FedAvg(), without(sparse_client(encoded=False), NODES[3]), rounds=1)
    assert got.arrays.keys() == others.arrays.keys()
    for name, array in got.arrays.items():
        assert np.allclose(array.numpy(), others.arrays[name].numpy(), rtol=0, atol=1e-6)

    recording = Recording(tmp_path / "r")
    entries = {int(entry.node): entry for entry in recording.entries()}
    assert len(entries) == N
    assert recording.verify() == []
    reader = ExchangeReader(recording, model())
    file = entries[NODES[3]].file
    with pytest.raises(RecordingError, match=rf"{file}: not a safetensors file"):
        _ = reader.exchange(entries[NODES[3]]).update["0.weight"]
    assert reader.exchange(entries[NODES[4]]).update["0.weight"].shape == (30, 20)


def test_parameters_that_come_back_as_integers_are_refused_when_read(tmp_path: Path) -> None:
    data = bytes(save({"0": np.ones((30, 20), dtype=bool)}))
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        run(RecordingStrategy(Decoding(FedAvg()), writer), malformed(data, NODES[0]), rounds=1)
    recording = Recording(tmp_path / "r")
    entry = next(entry for entry in recording.entries() if entry.node == str(NODES[0]))
    with pytest.raises(RecordingError, match="not floating-point"):
        _ = ExchangeReader(recording, model()).exchange(entry).update["0.weight"]


def test_malformed_replies_from_everyone_stop_the_run_and_say_why() -> None:
    strategy = Decoding(RequireReplies(FedAvg()))
    with pytest.raises(RuntimeError, match=r"none of 8 clients .* cannot be decoded"):
        run(strategy, malformed(b"", *NODES), rounds=1)


def test_an_array_that_is_no_npy_is_an_error_reply() -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        reply = sparse_client(encoded=True)(content, node)
        if node == NODES[0]:
            broken = Array("uint8", (3,), "numpy.ndarray", b"\x93NUMPY")
            reply["arrays"] = ArrayRecord({ARRAY: broken})
        return reply

    inner = Listening(FedAvg())
    run(Decoding(inner), client, rounds=1)
    assert [reply.metadata.src_node_id for reply in inner.heard if reply.has_error()] == [NODES[0]]


def test_a_client_that_was_not_asked_is_an_error_reply() -> None:
    inner = Listening(FedAvg())
    strategy, grid = Decoding(inner), InProcessGrid(sparse_client(encoded=True), NODES)
    messages = list(strategy.configure_train(1, initial(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    strategy._asked.pop(NODES[0])
    strategy.aggregate_train(1, replies)
    (failed,) = (reply for reply in inner.heard if reply.has_error())
    assert "nothing was sent to this client" in str(failed.error.reason)


def test_sizes_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getLogger("flwr"), "propagate", True)
    caplog.set_level("INFO", "flwr")
    run(Decoding(FedAvg()), sparse_client(encoded=True), rounds=2)
    said = [line for line in caplog.messages if "sparse" in line]
    assert len(said) == 2
    assert said[0].startswith("round 1: 8 of 8 replies are sparse, ")


def test_the_tap_on_the_grid_marks_sparse_replies(tmp_path: Path) -> None:
    with RecordingWriter.open(tmp_path / "r", MANIFEST) as writer:
        grid = RecordingGrid(InProcessGrid(sparse_client(encoded=True), NODES), writer)
        Decoding(FedAvg(fraction_evaluate=0)).start(grid, initial(), num_rounds=1)
    recording = Recording(tmp_path / "r")
    entries = list(recording.entries())
    assert [entry.payload for entry in entries] == ["sparse-update"] * N
    for entry in entries:
        assert list(recording.returned(entry)) == list(model().state_dict())


def test_without_the_wrapper_a_sparse_reply_is_no_model() -> None:
    """It must not be averaged in silence: the tensors that come out have another name."""
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        result = run(FedAvg(fraction_evaluate=0), sparse_client(encoded=True), rounds=1)
        model().load_state_dict(result.arrays.to_torch_state_dict())

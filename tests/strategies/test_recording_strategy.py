"""RecordingStrategy: transparent around every strategy, and true to what was exchanged."""

from __future__ import annotations

import gc
import inspect
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import nn

from fl_privacy.recording import Entry, Manifest, Recording, RecordingWriter
from strategies.recording import RecordingStrategy
from strategies.require_replies import RequireReplies
from strategies.sorted_replies import SortedReplies
from strategies.wrapper import StrategyWrapper, weight_key
from tests.strategies.in_process_grid import Client, ClientError, InProcessGrid, round_in

NODES = list(range(1_000_001, 1_000_009))
N = len(NODES)
SHAPES = {"conv.weight": (4, 3), "conv.bias": (4,), "bn.num_batches_tracked": ()}
Replies = dict[tuple[int, int], dict[str, np.ndarray]]


def initial() -> ArrayRecord:
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    arrays["bn.num_batches_tracked"] = np.asarray(3.0, dtype=np.float32)
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def noise_client(log: Replies | None = None) -> Client:
    """Returns the parameters plus noise that depends on node and round only."""

    def client(content: RecordDict, node: int) -> RecordDict:
        server_round = round_in(content)
        rng = np.random.default_rng([node, server_round])
        sent = next(iter(content.array_records.values()))
        arrays = {
            name: np.asarray(array.numpy() + rng.normal(size=array.shape).astype(np.float32))
            for name, array in sent.items()
        }
        if log is not None:
            log.setdefault((server_round, node), arrays)  # training comes before evaluation
        metrics = MetricRecord({"num-examples": node % 5 + 1, "norm_bit": node % 2})
        metrics["train_loss"] = rng.uniform()
        return RecordDict(
            {
                "arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}),
                "metrics": metrics,
                "fl-privacy": ConfigRecord({"partition-id": node - NODES[0]}),
            }
        )

    return client


def tree_client(content: RecordDict, node: int) -> RecordDict:
    """One boosted tree, as FedXgbBagging reads it."""
    tree = {"id": 0, "node": node}
    model = {
        "gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},
        "iteration_indptr": [0, 1],
        "trees": [tree],
        "tree_info": [0],
    }
    booster = json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()
    arrays = ArrayRecord([np.frombuffer(booster, dtype=np.uint8)])
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})


def dp(name: str, **settings: float) -> Callable[[], Strategy]:
    wrapper = getattr(flower, f"DifferentialPrivacy{name}Clipping")
    return lambda: wrapper(FedAvg(), noise_multiplier=0.5, num_sampled_clients=N, **settings)


CASES: dict[str, Callable[[], Strategy]] = {
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=1),
    "DifferentialPrivacyClientSideAdaptiveClipping": dp("ClientSideAdaptive"),
    "DifferentialPrivacyClientSideFixedClipping": dp("ClientSideFixed", clipping_norm=1.0),
    "DifferentialPrivacyServerSideAdaptiveClipping": dp("ServerSideAdaptive"),
    "DifferentialPrivacyServerSideFixedClipping": dp("ServerSideFixed", clipping_norm=1.0),
    "FedAdagrad": flower.FedAdagrad,
    "FedAdam": flower.FedAdam,
    "FedAvg": FedAvg,
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.9),
    "FedMedian": flower.FedMedian,
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedTrimmedAvg": flower.FedTrimmedAvg,
    "FedXgbBagging": flower.FedXgbBagging,
    "FedXgbCyclic": flower.FedXgbCyclic,
    "FedYogi": flower.FedYogi,
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1),
}


def shuffled(replies: list[Message], seed: int = 5) -> list[Message]:
    return random.Random(seed).sample(replies, len(replies))


def run(
    strategy: Strategy, client: Client, rounds: int = 3, start: ArrayRecord | None = None
) -> Result:
    """A federation from fixed seeds (Flower draws from the global generators)."""
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    grid = InProcessGrid(client, NODES, shuffled)
    return strategy.start(grid, start or initial(), num_rounds=rounds)


def writer_at(folder: Path) -> RecordingWriter:
    return RecordingWriter.open(folder / "recording", Manifest(created="2025-01-01T00:00:00Z"))


def recorded(folder: Path, **settings: object) -> list[Entry]:
    return list(Recording(folder / "recording").entries(**settings))  # type: ignore[arg-type]


def bits(result: Result) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: (v.dtype, tuple(v.shape), v.data) for k, v in result.arrays.items()}


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Bulyan and QFedAvg call ``gc.collect`` for each reply: spare it what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_flower_strategy_has_a_case() -> None:
    offered = {
        name
        for name in flower.__all__
        if issubclass(getattr(flower, name), Strategy)
        and not inspect.isabstract(getattr(flower, name))
    }
    assert set(CASES) == offered


@pytest.mark.parametrize("name", sorted(CASES))
def test_recording_leaves_the_aggregate_bit_identical(name: str, tmp_path: Path) -> None:
    trees = "Xgb" in name
    client = tree_client if trees else noise_client()
    start = ArrayRecord([np.zeros(0, dtype=np.uint8)]) if trees else None
    plain = run(CASES[name](), client, start=start)
    with writer_at(tmp_path) as writer:
        watched = run(RecordingStrategy(CASES[name](), writer), client, start=start)
    assert bits(watched) == bits(plain)
    assert {r: dict(m) for r, m in watched.train_metrics_clientapp.items()} == {
        r: dict(m) for r, m in plain.train_metrics_clientapp.items()
    }
    assert len(recorded(tmp_path)) == 3 * (1 if name == "FedXgbCyclic" else N)
    assert Recording(tmp_path / "recording").verify() == []


@pytest.mark.parametrize("name", ["FedAvg", "DifferentialPrivacyServerSideFixedClipping"])
def test_replies_are_recorded_as_received(name: str, tmp_path: Path) -> None:
    returned: Replies = {}
    with writer_at(tmp_path) as writer:
        run(RecordingStrategy(CASES[name](), writer), noise_client(returned))
    recording = Recording(tmp_path / "recording")
    entries = list(recording.entries())
    assert {(e.round, int(e.node)) for e in entries} == set(returned)
    for entry in entries:
        expected = returned[entry.round, int(entry.node)]
        got = recording.returned(entry)
        assert list(got) == list(expected)
        assert all(got[k].numpy().tobytes() == v.tobytes() for k, v in expected.items())
        assert all(tuple(got[k].shape) == v.shape for k, v in expected.items())
        assert entry.num_examples == int(entry.node) % 5 + 1


def test_what_was_sent_is_the_aggregate_of_the_round_before(tmp_path: Path) -> None:
    with writer_at(tmp_path) as writer:
        run(RecordingStrategy(FedAvg(), writer), noise_client())
    recording = Recording(tmp_path / "recording")
    assert len({e.global_digest for e in recording.entries()}) == 3
    first = next(recording.entries(rounds={1}))
    for name, array in initial().items():
        assert np.array_equal(recording.sent(first)[name].numpy(), array.numpy())
    after_one = run(FedAvg(), noise_client(), rounds=1).arrays
    second = next(recording.entries(rounds={2}))
    for name, array in after_one.items():
        assert np.array_equal(recording.sent(second)[name].numpy(), array.numpy())


def test_rounds_and_clients_are_selected(tmp_path: Path) -> None:
    with writer_at(tmp_path) as writer:
        strategy = RecordingStrategy(FedAvg(), writer, rounds="2-", max_clients=3)
        run(strategy, noise_client())
    entries = recorded(tmp_path)
    assert {e.round for e in entries} == {2, 3}
    for server_round in (2, 3):
        nodes = {int(e.node) for e in entries if e.round == server_round}
        assert nodes == set(NODES[:3])


def test_a_round_that_is_not_recorded_is_not_touched(tmp_path: Path) -> None:
    class Untouched(StrategyWrapper):
        sent: list[Message]
        seen: object = None

        def configure_train(self, *args: object) -> list[Message]:
            self.sent = list(super().configure_train(*args))  # type: ignore[arg-type]
            return self.sent

        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            self.seen = replies
            return None, None

    with writer_at(tmp_path) as writer:
        inner = Untouched(FedAvg())
        strategy = RecordingStrategy(inner, writer, rounds="5")
        grid = InProcessGrid(noise_client(), NODES)
        assert strategy.configure_train(1, initial(), ConfigRecord(), grid) is inner.sent
        replies = iter(())
        strategy.aggregate_train(1, replies)
        assert inner.seen is replies
    assert not (tmp_path / "recording" / "globals").exists()


def test_an_error_reply_is_recorded_under_the_client_that_failed(tmp_path: Path) -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        if node == NODES[2]:
            raise ClientError("Node Unavailable:\n  no heartbeat " + "x" * 1000)
        return noise_client()(content, node)

    with writer_at(tmp_path) as writer:
        run(RecordingStrategy(FedAvg(), writer), client, rounds=1)
    (failed,) = recorded(tmp_path, status="error")
    assert failed.node == str(NODES[2])
    assert failed.status.startswith("error: Node Unavailable: no heartbeat x")
    assert (failed.file, failed.sha256, failed.num_examples) == ("", "", None)
    assert len(recorded(tmp_path)) == N - 1
    lines = (tmp_path / "recording/index/000000.jsonl").read_bytes().splitlines(keepends=True)
    assert max(map(len, lines)) <= 512


def with_header(header: bytes) -> Array:
    """A ``.npy`` of version 1.0 whose header says anything."""
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8)
    return Array("float32", (2,), "numpy.ndarray", data)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (Array("float32", (2,), "numpy.ndarray", b"not an npy file"), "magic"),
        (Array("float32", (2,), "numpy.ndarray", Array(np.ones(2)).data[:-1]), "w"),
        (Array(np.ones(2, dtype=np.complex128)), "complex128"),
        (Array(np.ones(2, dtype="M8[s]")), "datetime64"),
        (with_header(b"{'descr': ("), "EOF"),
        (with_header(b"-" * 9000 + b"1"), ""),
        (with_header(b"(" * 900), ""),
        (with_header(b"  1\n 2"), "indent"),
        (with_header(b"{'descr': (), 'fortran_order': False, 'shape': (2,)}"), ""),
        (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-5,)}"), ""),
        (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 9**99)}"), ""),
    ],
    ids=[
        "garbage",
        "cut off",
        "complex128",
        "dates",
        "open",
        "deep",
        "nested",
        "indented",
        "no dtype",
        "negative",
        "huge",
    ],
)
def test_a_hostile_reply_is_an_error_entry_and_reaches_the_strategy(
    array: Array, reason: str, tmp_path: Path
) -> None:
    seen: list[Message] = []

    class Listening(StrategyWrapper):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            seen.extend(replies)
            return None, None

    def client(content: RecordDict, node: int) -> RecordDict:
        metrics = MetricRecord({"num-examples": 4})
        return RecordDict({"a": ArrayRecord({"w": array}), "m": metrics})

    with writer_at(tmp_path) as writer:
        run(RecordingStrategy(Listening(FedAvg(fraction_evaluate=0)), writer), client, rounds=1)
    entries = recorded(tmp_path, status="error")
    assert len(entries) == len(seen) == N
    assert all("'w'" in e.status and reason in e.status for e in entries)


def test_parameters_are_told_from_buffers_by_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    start = ArrayRecord(model.state_dict())
    with writer_at(tmp_path) as writer:
        strategy = RecordingStrategy(FedAvg(), writer, model=model)
        run(strategy, noise_client(), rounds=1, start=start)
    recording = Recording(tmp_path / "recording")
    entry = next(recording.entries())
    kinds = {t.name: t.kind for t in recording.schema(entry.schema_digest).tensors}
    assert {k for k, v in kinds.items() if v == "buffer"} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert {k for k, v in kinds.items() if v == "parameter"} == {
        name for name, _ in model.named_parameters()
    }
    assert recording.sent(entry)["1.num_batches_tracked"].dtype.is_floating_point is False


def test_the_weight_key_is_found_through_wrappers() -> None:
    inner = FedAvg(weighted_by_key="images")
    wrapped = flower.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 2)
    assert weight_key(SortedReplies(wrapped)) == "images"


def test_all_clients_failing_stops_the_run_after_recording_the_errors(tmp_path: Path) -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        raise ClientError(f"dataset of {node} not found")

    with (
        writer_at(tmp_path) as writer,
        pytest.raises(RuntimeError, match=r"none of 8 clients .* dataset of .* \(and 5 more\)"),
    ):
        run(RecordingStrategy(RequireReplies(FedAvg()), writer), client)
    assert len(recorded(tmp_path, status="error")) == N


def test_the_reported_reasons_do_not_steer_the_terminal() -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        raise ClientError("\x1b]0;pwned\x07\x1b[2Jno\nmemory")

    with pytest.raises(RuntimeError, match=r"they report: \]0;pwned\[2Jno memory$"):
        run(RequireReplies(FedAvg()), client, rounds=1)


def test_one_reply_is_enough_and_no_training_is_no_failure() -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        if node != NODES[0]:
            raise ClientError("no")
        return noise_client()(content, node)

    assert run(RequireReplies(FedAvg()), client, rounds=1).arrays
    run(RequireReplies(FedAvg(fraction_train=0.0)), noise_client(), rounds=1)


def test_no_reply_in_time_is_a_failure() -> None:
    strategy = RequireReplies(FedAvg())
    grid = InProcessGrid(noise_client(), NODES)
    strategy.configure_train(1, initial(), ConfigRecord(), grid)
    with pytest.raises(RuntimeError, match="no reply arrived in time"):
        strategy.aggregate_train(1, [])


def test_sorted_replies_make_the_sum_independent_of_arrival() -> None:
    results = []
    for seed in range(4):
        grid = InProcessGrid(noise_client(), NODES, partial(shuffled, seed=seed))
        results.append(bits(SortedReplies(FedAvg()).start(grid, initial(), num_rounds=2)))
    assert all(result == results[0] for result in results)


def test_replies_without_a_partition_come_last_by_node_id() -> None:
    order: list[int] = []

    class Listening(StrategyWrapper):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            order.extend(reply.metadata.src_node_id for reply in replies)
            return None, None

    def client(content: RecordDict, node: int) -> RecordDict:
        reply = noise_client()(content, node)
        partition = {NODES[5]: 1, NODES[6]: 0}.get(node)
        reply["fl-privacy"] = ConfigRecord({} if partition is None else {"partition-id": partition})
        return reply

    run(SortedReplies(Listening(FedAvg(fraction_evaluate=0))), client, rounds=1)
    rest = [n for n in NODES if n not in (NODES[5], NODES[6])]
    assert order == [NODES[6], NODES[5], *rest]


def test_a_strategy_with_its_own_loop_is_refused() -> None:
    class Own(FedAvg):
        def start(self, *args: object, **kwargs: object) -> Result:
            return Result()

    with pytest.raises(ValueError, match=r"Own has a start\(\) of its own.*RecordingGrid"):
        SortedReplies(Own())

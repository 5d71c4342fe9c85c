"""Screening: what is malformed stays out, honest replies pass untouched, every reason is kept."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from logging import getLogger
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from clients.encoding import sparse_if_smaller
from fl_privacy.inspection import overview
from fl_privacy.recording import Manifest, Recording, RecordingError, RecordingWriter, Refusal
from fl_privacy.sparse import ARRAY
from strategies.decoding import Decoding
from strategies.recording import RecordingStrategy
from strategies.reply_rules import HEADER_BYTES, OTHER_BYTES, name_flaw
from strategies.require_replies import RequireReplies
from strategies.screening import Screening, ScreeningError
from strategies.wrapper import StrategyWrapper
from tests.strategies.flower_strategies import made
from tests.strategies.in_process_grid import Client, ClientError, InProcessGrid, round_in

NODES = list(range(101, 109))
N = len(NODES)
MOST = 500
MANIFEST = Manifest(created="2025-01-01T00:00:00Z")
STATE: dict[str, np.ndarray] = {
    "conv.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "conv.bias": np.ones(4, dtype=np.float32),
    "bn.num_batches_tracked": np.asarray(3, dtype=np.int64),
}
STRATEGIES = [
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "Krum",
    "MultiKrum",
    "QFedAvg",
    "FedAdam",
    "FedMedian",
]
NAN = Array(np.full(4, np.nan, dtype=np.float32))


def initial(counter: bool = True) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(value) for name, value in STATE.items() if counter or "num" not in name}
    )


def honest(content: RecordDict, node: int) -> RecordDict:
    """What was sent plus noise, by node and round; the counter comes back as an integer."""
    rng = np.random.default_rng([node, round_in(content)])
    (sent,) = content.array_records.values()
    arrays = OrderedDict()
    for name in sent:
        value = np.asarray(sent[name].numpy() + rng.normal(size=STATE[name].shape))
        arrays[name] = Array(value.astype(STATE[name].dtype))
    metrics = MetricRecord({"num-examples": node % 5 + 1, "norm_bit": node % 2})
    metrics["train_loss"] = rng.uniform()
    report = ConfigRecord({"partition-id": node, "empty": ""})
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics, "fl-privacy": report})


def run(
    strategy: Strategy,
    client: Client = honest,
    rounds: int = 3,
    nodes: Iterable[int] = NODES,
    start: ArrayRecord | None = None,
    order: Callable[[list[Message]], list[Message]] = lambda replies: replies[::-1],
) -> Result:
    """A federation from fixed seeds (Flower draws from the global generators)."""
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    grid = InProcessGrid(client, list(nodes), order)
    return strategy.start(grid, start or initial(), num_rounds=rounds)


def bits(result: Result) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: (v.dtype, tuple(v.shape), v.data) for k, v in result.arrays.items()}


def by_node(replies: list[Message]) -> list[Message]:
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Bulyan and QFedAvg call ``gc.collect`` for each reply: spare it what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


class Seen(StrategyWrapper):
    """Notes what reaches the strategy inside."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.replies: list[Message] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.replies = list(replies)
        return super().aggregate_train(server_round, self.replies)


@pytest.mark.parametrize("name", STRATEGIES)
def test_honest_replies_give_the_same_aggregate_bit_for_bit(name: str) -> None:
    start = initial(counter=name != "QFedAvg")  # which takes no integers
    screening = Screening(made(name, clients=N))
    assert bits(run(screening, start=start)) == bits(run(made(name, clients=N), start=start))
    assert screening.refusals == []


@pytest.mark.parametrize(
    "name", ["FedAvg", "FedMedian", "DifferentialPrivacyServerSideFixedClipping"]
)
def test_with_malformed_replies_the_rest_counts_as_if_it_were_alone(name: str) -> None:
    bad = set(NODES[::3])

    def client(content: RecordDict, node: int) -> RecordDict:
        reply = honest(content, node)
        if node in bad:
            reply.array_records["arrays"]["conv.bias"] = NAN
        return reply

    alone = run(
        made(name, clients=N), nodes=[node for node in NODES if node not in bad], order=by_node
    )
    assert bits(run(Screening(made(name, clients=N)), client, order=by_node)) == bits(alone)


# --- a thousand malformed replies ---------------------------------------------------------


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def array(data: bytes, shape: tuple[int, ...] = (4,), stype: str = "numpy.ndarray") -> Array:
    return Array("float32", shape, stype, data)


JUNK = bytes(OTHER_BYTES + 1)
ODD_METRICS: st.SearchStrategy[float | list[float]] = st.sampled_from(
    [np.inf, -np.inf, [0.5, np.nan], 10**400]
)
NAMES = st.sampled_from(list(STATE))
NOT_FINITE = st.sampled_from([np.nan, np.inf, -np.inf])
PATHS = st.sampled_from(["/etc/x", "../x", "a/../b", "~root", "C:\\x", "..\\x", "a/.."])
UNSEEN = st.text("\x00\x1b\n\u202e\u200b ", min_size=1, max_size=9)
NAMELESS = st.one_of(PATHS, UNSEEN, st.just(""), st.just("x" * 300))
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple).filter(lambda s: s not in {(4,)})
DTYPES = st.sampled_from(
    ["float64", "float16", "int64", "uint8", "bool", "complex64", "S4", "U2", "M8[s]"]
)
CLAIMS = st.one_of(
    st.integers(-(2**63), 0),
    st.integers(MOST + 1, 2**63 - 1),
    st.floats(max_value=0.99),
    st.floats(min_value=MOST + 0.1),
    st.just(float("nan")),
    st.lists(st.integers(1, 9), max_size=3),
)
HEADERS = st.sampled_from(
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4,)",
        "(" * 60,
        "",
    ]
)


@st.composite
def malformed(draw: st.DrawFn, reply: RecordDict, node: int) -> RecordDict:
    """An honest reply with something wrong in it."""
    name = draw(NAMES)
    arrays, metrics = reply.array_records["arrays"], reply.metric_records["metrics"]
    match draw(st.integers(0, 19)):
        case 0:
            del arrays[name]
        case 1:
            arrays[str(draw(st.text().filter(lambda text: text not in STATE)))] = arrays[name]
        case 2:
            arrays[draw(NAMELESS)] = arrays.pop(name)
        case 3:
            arrays["conv.weight"] = arrays.pop("conv.weight")  # now it comes last
        case 4:
            arrays["conv.bias"] = Array(np.ones(draw(SHAPES), dtype=np.float32))
        case 5:
            arrays["conv.bias"] = Array(np.zeros(4, dtype=draw(DTYPES)))
        case 6:
            value = arrays["conv.weight"].numpy().copy()
            value.flat[draw(st.integers(0, 11))] = draw(NOT_FINITE)
            arrays["conv.weight"] = Array(value)
        case 7:
            data = arrays[name].data
            arrays[name] = array(data[: draw(st.integers(0, len(data) - 1))])
        case 8:
            arrays["conv.bias"] = array(draw(st.binary(max_size=200)))
        case 9:
            arrays["conv.bias"] = array(npy(draw(HEADERS), bytes(16)))
        case 10:
            padding = bytes(HEADER_BYTES + draw(st.integers(17, 10**5)))
            arrays["conv.bias"] = array(arrays["conv.bias"].data + padding)
        case 11:
            wrong = st.text().filter(lambda text: text != "numpy.ndarray")
            arrays["conv.bias"] = array(arrays["conv.bias"].data, stype=draw(wrong))
        case 12:
            lie = st.lists(st.integers(-(2**70), 2**70)).map(tuple).filter(lambda s: s != (4,))
            arrays["conv.bias"] = array(arrays["conv.bias"].data, shape=draw(lie))
        case 13:
            reply["more"] = reply[draw(st.sampled_from(["metrics", "arrays"]))]
        case 14:
            del reply[draw(st.sampled_from(["metrics", "arrays"]))]
        case 15:
            metrics["num-examples"] = draw(CLAIMS)
        case 16:
            wrong_value: float | list[float] = draw(ODD_METRICS)
            metrics[draw(st.sampled_from(["train_loss", "x"]))] = wrong_value
        case 17:
            metrics[f"of {node} alone"] = 1.0
        case 18:
            reply["config"] = ConfigRecord({"junk": JUNK})
        case _:
            junk = np.frombuffer(draw(st.binary(max_size=300)), dtype=np.uint8)
            reply["arrays"] = ArrayRecord({ARRAY: Array(junk)})
    return reply


BAD = 50
GOOD = N


@dataclass
class Server:
    """A recorded federation that goes on from example to example, one round each."""

    location: str
    writer: RecordingWriter
    round: int = 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    location = "memory://screening/recording"  # a disk would have to sync every file
    with RecordingWriter.open(location, MANIFEST) as writer:
        yield Server(location, writer)
    fsspec.filesystem("memory").rm("/screening", recursive=True)


@given(st.data())
@settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_of_1000_malformed_replies_none_is_aggregated_and_each_has_its_reason(
    server: Server, data: st.DataObject
) -> None:
    server.round += 1
    nodes = [*NODES, *range(1001, 1001 + BAD)]

    def client(content: RecordDict, node: int) -> RecordDict:
        reply = honest(content, node)
        return reply if node in NODES else data.draw(malformed(reply, node))

    seen = Seen(FedAvg(fraction_evaluate=0.0))
    screening = Screening(Decoding(RequireReplies(seen)), most_examples=MOST)
    strategy = RecordingStrategy(screening, server.writer)
    grid = InProcessGrid(client, nodes, lambda replies: replies[::-1])
    asked = strategy.configure_train(server.round, initial(), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(asked))
    good = [reply for reply in replies if reply.metadata.src_node_id in NODES]
    strategy.aggregate_train(server.round, replies)
    assert [id(reply) for reply in seen.replies] == [id(reply) for reply in good]
    refusals = [r for r in Recording(server.location).refusals() if r.round == server.round]
    lines = {
        e.node: e.n for e in Recording(server.location).entries(rounds=[server.round], status=None)
    }
    assert len(lines) == GOOD + BAD
    assert {r.node: r.n for r in refusals} == {str(n): lines[str(n)] for n in nodes[GOOD:]}
    assert all(r.reason and r.reason.isprintable() for r in refusals)


def test_the_recording_of_malformed_replies_is_whole(server: Server) -> None:
    assert server.round >= 20
    assert Recording(server.location).verify() == []


# --- one by one ---------------------------------------------------------------------------


def changed(change: Callable[[RecordDict], object], *nodes: int) -> Client:
    """Honest clients but for ``nodes``, whose replies are changed."""

    def client(content: RecordDict, node: int) -> RecordDict:
        reply = honest(content, node)
        if node in nodes:
            change(reply)
        return reply

    return client


def spoil(reply: RecordDict) -> None:
    reply.array_records["arrays"]["conv.bias"] = NAN


def recorded(folder: Path, strategy: Strategy, client: Client, **options: str) -> list[Refusal]:
    """The refusals of a recorded round, whether or not it fails."""
    with RecordingWriter.open(folder, MANIFEST) as writer, suppress(ScreeningError):
        run(RecordingStrategy(strategy, writer, **options), client, rounds=1)  # type: ignore[arg-type]
    return list(Recording(folder).refusals())


def test_the_line_of_a_refused_reply_says_what_was_received(tmp_path: Path) -> None:
    (refusal,) = recorded(tmp_path / "r", Screening(FedAvg()), changed(spoil, NODES[2]))
    recording = Recording(tmp_path / "r")
    (entry,) = recording.entries(nodes=[str(NODES[2])])
    assert (entry.status, entry.payload, entry.n) == ("ok", "weights", refusal.n)
    assert recording.returned(entry)["conv.bias"].isnan().all()
    assert refusal.reason == "array 'conv.bias' holds NaN or infinity"


def test_a_reply_that_is_not_recorded_has_a_reason_without_a_line(tmp_path: Path) -> None:
    client = changed(spoil, NODES[2])
    (refusal,) = recorded(tmp_path / "r", Screening(FedAvg()), client, rounds="7")
    assert (refusal.n, refusal.node, refusal.round) == (None, str(NODES[2]), 1)


def test_the_policy_fail_ends_the_run_and_keeps_the_reason(tmp_path: Path) -> None:
    client = changed(spoil, NODES[2])
    with pytest.raises(ScreeningError, match=r"round 1: 1 of 8 replies .* holds NaN"):
        run(Screening(FedAvg(), policy="fail"), client)
    assert len(recorded(tmp_path / "r", Screening(FedAvg(), policy="fail"), client)) == 1
    assert recorded(tmp_path / "all", Screening(FedAvg(), policy="fail"), honest) == []


def test_a_round_of_which_nothing_is_left_says_so(tmp_path: Path) -> None:
    with pytest.raises(ScreeningError, match=r"8 of 8 .* none is left, nothing to aggregate: arr"):
        run(Screening(RequireReplies(FedAvg())), changed(spoil, *NODES))
    assert len(recorded(tmp_path / "r", Screening(FedAvg()), changed(spoil, *NODES))) == N


def test_errors_of_clients_pass_and_are_nothing_to_aggregate() -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        if node != NODES[0]:
            raise ClientError("no data")
        return changed(spoil, node)(content, node)

    seen = Seen(FedAvg())
    with pytest.raises(ScreeningError, match="the others are errors"):
        run(Screening(seen), client)
    screening = Screening(seen)
    run(screening, changed(lambda reply: None), nodes=NODES, rounds=1)
    assert len(seen.replies) == N


def test_what_a_client_reports_as_an_error_forges_no_line_of_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getLogger("flwr"), "propagate", True)
    forged = "no\x1b[31m data\nINFO: round 1 is fine\r" + 40_000 * "x"

    def client(content: RecordDict, node: int) -> RecordDict:
        if node == NODES[0]:
            raise ClientError(forged)
        return honest(content, node)

    with caplog.at_level("INFO", logger="flwr"):
        run(Screening(FedAvg()), client, rounds=1)
    said = [r.getMessage() for r in caplog.records if "error in reply" in r.getMessage()]
    assert said
    for line in said:
        assert "no[31m data INFO: round 1 is fine x" in line
        assert line.removeprefix("\t").isprintable()
        assert len(line) < 10_100


def test_a_client_counts_once_a_round() -> None:
    screening = Screening(FedAvg())
    twice = run(screening, rounds=1, order=lambda replies: [*by_node(replies), replies[0]])
    assert bits(twice) == bits(run(FedAvg(), rounds=1, order=by_node))


def test_what_clients_may_name_most_of_them_decide() -> None:
    def extra(reply: RecordDict) -> None:
        reply.metric_records["metrics"]["more"] = 1.0

    odd = changed(extra, *NODES[:3])
    with pytest.raises(AppExitException):  # what one such client does to FedAvg
        run(FedAvg(), changed(extra, NODES[0]), rounds=1)
    screening, seen = Seen(FedAvg(fraction_evaluate=0.0)), Seen(FedAvg(fraction_evaluate=0.0))
    run(Screening(screening), odd, rounds=1)
    assert {reply.metadata.src_node_id for reply in screening.replies} == set(NODES[3:])
    run(Screening(seen), changed(extra, *NODES[:5]), rounds=1)
    assert {reply.metadata.src_node_id for reply in seen.replies} == set(NODES[:5])


def test_evaluation_is_screened_too() -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        return RecordDict({"m": MetricRecord({"num-examples": 1 if node > NODES[0] else -9})})

    result = run(Screening(FedAvg(fraction_train=0.0)), client, rounds=1)
    assert result.evaluate_metrics_clientapp[1] is not None
    alone = run(FedAvg(fraction_train=0.0), client, rounds=1, nodes=NODES[1:])
    assert dict(result.evaluate_metrics_clientapp[1]) == dict(alone.evaluate_metrics_clientapp[1])


def test_a_loss_may_be_withheld_where_nothing_depends_on_it() -> None:
    def keep(reply: RecordDict) -> None:
        reply.metric_records["metrics"]["train_loss"] = float("nan")

    run(Screening(FedAvg(), policy="fail", withheld=["train_loss"]), changed(keep, NODES[0]))
    with pytest.raises(ScreeningError, match="'train_loss' is nan"):
        run(Screening(FedAvg(), policy="fail"), changed(keep, NODES[0]), rounds=1)


WIDE = {"w": np.zeros(2000, dtype=np.float32)}


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_sparse_reply_is_judged_by_what_it_stands_for(value: float) -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        new = WIDE["w"].copy()
        new[7] = value if node == NODES[0] else 2.0
        (sent,) = content.array_records.values()
        reply = sparse_if_smaller(sent, ArrayRecord({"w": Array(new)}))
        assert list(reply) == [ARRAY]
        return RecordDict({"arrays": reply, "m": MetricRecord({"num-examples": 1})})

    seen = Seen(FedAvg(fraction_evaluate=0.0))
    run(Screening(Decoding(seen)), client, rounds=1, start=ArrayRecord({"w": Array(WIDE["w"])}))
    assert len(seen.replies) == (N if value == 1.0 else N - 1)
    with pytest.raises(ScreeningError, match="none of those sent"):  # nothing would decode it
        run(Screening(FedAvg()), client, start=ArrayRecord({"w": Array(WIDE["w"])}))


@pytest.mark.parametrize("name", ["train/loss", "a.b", "loss 2", "\u00e9poque", "..."])
def test_ordinary_names_pass(name: str) -> None:
    assert name_flaw(RecordDict({"m": MetricRecord({name: 1.0})})) == ""


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../b", "~root", "C:\\x", "..\\x", "a/.."])
def test_no_name_may_look_like_a_path(name: str) -> None:
    for content in (
        RecordDict({"m": MetricRecord({name: 1.0})}),
        RecordDict({"c": ConfigRecord({name: 1.0})}),
        RecordDict({name: ArrayRecord()}),
    ):
        assert "looks like a path" in name_flaw(content)


def test_inspect_shows_reasons_and_obeys_none(tmp_path: Path) -> None:
    def name(reply: RecordDict) -> None:
        reply.array_records["arrays"]["\x1b]0;x\x07[red]"] = NAN

    recorded(tmp_path / "r", Screening(FedAvg()), changed(name, NODES[2]))
    console = Console(file=StringIO(), width=200, force_terminal=False)
    for table in overview(Recording(tmp_path / "r")):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Not aggregated" in shown
    assert "[red]" in shown
    assert "\x1b" not in shown


def test_a_damaged_file_of_reasons_is_named(tmp_path: Path) -> None:
    recorded(tmp_path / "r", Screening(FedAvg()), changed(spoil, NODES[2]))
    (file,) = (tmp_path / "r" / "refused").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RecordingError, match="damaged"):
        list(Recording(tmp_path / "r").refusals())
    assert any(file.name in problem for problem in Recording(tmp_path / "r").verify())

"""RecordingGrid: records what passes, for apps whose strategy cannot be wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fl_privacy.recording import Manifest, Recording, RecordingWriter, match_names
from fl_privacy.rounds import parse_rounds
from strategies.grid import RecordingGrid, is_training, round_of
from strategies.recorder import num_examples_of
from tests.strategies.in_process_grid import ClientError, InProcessGrid

NODES = [11, 12, 13, 14]
WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def writer_at(folder: Path) -> RecordingWriter:
    return RecordingWriter.open(folder / "recording", Manifest(created="2025-01-01T00:00:00Z"))


def legacy_client(content: RecordDict, node: int) -> RecordDict:
    """What Flower makes of a NumPyClient's reply: arrays without names."""
    if node == 13:
        raise ClientError("out of memory")
    ins = recorddict_to_fitins(content, keep_input=True)
    arrays = [array + node for array in parameters_to_ndarrays(ins.parameters)]
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), 5, {})
    return fitres_to_recorddict(result, keep_input=True)


def legacy_message(grid: RecordingGrid, node: int, group: str = "2") -> Message:
    arrays = {"0": WEIGHTS, "1": np.zeros(2, dtype=np.float32)}
    record = ArrayRecord(
        {k: Array("", (), "numpy.ndarray", Array(v).data) for k, v in arrays.items()}
    )
    content = RecordDict({"fitins.parameters": record, "fitins.config": ConfigRecord({"lr": 0.1})})
    return grid.create_message(content, "train", node, group)


def test_a_legacy_app_sends_to_each_client_from_a_pool(tmp_path: Path) -> None:
    with writer_at(tmp_path) as writer:
        grid = RecordingGrid(InProcessGrid(legacy_client, NODES), writer)
        messages = [legacy_message(grid, node) for node in grid.get_node_ids()]

        def send(message: Message) -> Iterable[Message]:
            return grid.send_and_receive([message])

        with ThreadPoolExecutor(4) as pool:
            replies = [reply for found in pool.map(send, messages) for reply in found]
    assert len(replies) == 4
    recording = Recording(tmp_path / "recording")
    entries = list(recording.entries())
    assert {(e.round, e.node, e.num_examples) for e in entries} == {
        (2, str(node), 5) for node in (11, 12, 14)
    }
    (failed,) = recording.entries(status="error")
    assert (failed.node, failed.status) == ("13", "error: out of memory")
    assert len({e.global_digest for e in entries}) == 1
    for entry in entries:
        assert np.array_equal(recording.sent(entry)["0"].numpy(), WEIGHTS)
        assert np.array_equal(recording.returned(entry)["0"].numpy(), WEIGHTS + int(entry.node))
    names = match_names(nn.Linear(3, 2).state_dict(), recording.sent_schema(entries[0]))
    assert names == {"0": "weight", "1": "bias"}
    assert recording.verify() == []


def test_flowers_own_legacy_proxy_is_recorded(tmp_path: Path) -> None:
    """The path of a legacy ServerApp: parameters are popped from the reply once it is read."""
    parameters = ndarrays_to_parameters([WEIGHTS, np.zeros(2, dtype=np.float32)])
    with writer_at(tmp_path) as writer:
        grid = RecordingGrid(InProcessGrid(legacy_client, NODES), writer)
        for node in (11, 12):
            proxy = GridClientProxy(node, grid, run_id=1)
            result = proxy.fit(FitIns(parameters, {}), timeout=10.0, group_id=3)
            assert np.array_equal(parameters_to_ndarrays(result.parameters)[0], WEIGHTS + node)
    recording = Recording(tmp_path / "recording")
    entries = list(recording.entries(rounds={3}))
    assert [e.node for e in entries] == ["11", "12"]
    for entry in entries:
        assert np.array_equal(recording.sent(entry)["0"].numpy(), WEIGHTS)
        assert np.array_equal(recording.returned(entry)["0"].numpy(), WEIGHTS + int(entry.node))
    assert recording.verify() == []


def test_push_and_pull_are_recorded(tmp_path: Path) -> None:
    with writer_at(tmp_path) as writer:
        grid = RecordingGrid(InProcessGrid(legacy_client, NODES), writer)
        ids = list(grid.push_messages([legacy_message(grid, node) for node in NODES]))
        assert len(list(grid.pull_messages(ids[:2]))) == 2
        assert [e.node for e in Recording(tmp_path / "recording").entries()] == ["11", "12"]
        assert len(list(grid.pull_messages(ids[2:]))) == 2
        assert list(grid.pull_messages(ids)) == []
    assert len(list(Recording(tmp_path / "recording").entries(status=None))) == 4


def test_a_strategy_over_the_tap_is_recorded_and_evaluation_is_not(tmp_path: Path) -> None:
    def client(content: RecordDict, node: int) -> RecordDict:
        metrics = MetricRecord({"num-examples": 1})
        return RecordDict({"a": content.array_records["arrays"], "m": metrics})

    with writer_at(tmp_path) as writer:
        grid = RecordingGrid(InProcessGrid(client, NODES), writer, rounds="2-3", max_clients=2)
        FedAvg().start(grid, ArrayRecord({"w": Array(WEIGHTS)}), num_rounds=4)
    entries = list(Recording(tmp_path / "recording").entries())
    assert [e.round for e in entries] == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("config", "group", "expected"),
    [
        ({"server-round": 7}, "3", 7),
        ({"server_round": 8}, "", 8),
        ({}, "3", 3),
        ({}, "warm-up", 0),
        ({}, "", 0),
    ],
)
def test_the_round_is_read_from_the_message(
    config: dict[str, int], group: str, expected: int
) -> None:
    grid = InProcessGrid(legacy_client, NODES)
    content = RecordDict({"config": ConfigRecord({**config})})
    assert round_of(grid.create_message(content, "train", 11, group)) == expected


def test_only_training_messages_count() -> None:
    grid = InProcessGrid(legacy_client, NODES)
    kinds = {"train": True, "train.warm_up": True, "evaluate": False, "query.train": False}
    for kind, expected in kinds.items():
        assert is_training(grid.create_message(RecordDict(), kind, 11, "")) is expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ("3", {3}),
        ("1-3,7", {1, 2, 3, 7}),
        ("8-", {8, 9}),
        ("0,2-2", {0, 2}),
    ],
)
def test_round_specs(spec: str, expected: set[int]) -> None:
    is_recorded = parse_rounds(spec)
    assert {r for r in range(10) if is_recorded(r)} == expected


@pytest.mark.parametrize("spec", ["a", "1,,2", "-3", "1-2-3", "5-3", " "])
def test_bad_round_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="rounds"):
        parse_rounds(spec)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (4.0, 4), (float("nan"), None), (-1, None), (float("inf"), None), ([1], None)],
)
def test_a_number_of_examples_is_a_number(value: int | float | list[int], expected: int) -> None:
    content = RecordDict({"m": MetricRecord({"num-examples": value})})
    assert num_examples_of(content, ["images", "num-examples"]) == expected

"""A round starts with enough clients, and a run without them has an end."""

import time

import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fl_privacy.testing import toy_model
from strategies import await_clients
from strategies.await_clients import AwaitClients
from tests.strategies.in_process_grid import InProcessGrid


def strategy(wanted: int, seconds: float) -> AwaitClients:
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    return AwaitClients(inner, wanted=wanted, seconds=seconds)


def answer(content: RecordDict, node: int) -> RecordDict:
    arrays = content.array_records["arrays"]
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})


class Fleet(InProcessGrid):
    """Clients that come and go: how many there are at each look."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__(answer, [])
        self.counts = counts
        self.looks = list[int]()

    def get_node_ids(self) -> list[int]:
        count = self.counts[min(len(self.looks), len(self.counts) - 1)]
        self.looks.append(count)
        return list(range(1, count + 1))


def start(strategy: AwaitClients, grid: InProcessGrid, rounds: int = 1) -> None:
    strategy.start(grid, ArrayRecord(toy_model().state_dict()), num_rounds=rounds)


def test_the_first_round_waits_for_the_wanted_clients_and_until_no_more_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(await_clients, "SETTLED_SECONDS", 0.2)
    grid = Fleet([0, 1, 2, 3, 4])
    start(strategy(2, 5.0), grid)
    assert grid.looks.count(4) >= 3, "the third and fourth were waited for, too"


def test_too_few_clients_end_the_run_with_what_to_do() -> None:
    began = time.monotonic()
    expected = r"round 1: 1 of 2 clients connected within 0\.2 s; .*min-clients.*wait-seconds"
    with pytest.raises(RuntimeError, match=expected):
        start(strategy(2, 0.2), Fleet([1]))
    assert time.monotonic() - began < 60


def test_a_later_round_waits_for_a_client_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(await_clients, "SETTLED_SECONDS", 0.0)

    grid = Fleet([2, 2, 1, 1, 1, 2])
    start(strategy(2, 5.0), grid, rounds=2)
    assert grid.looks[2:6] == [1, 1, 1, 2]

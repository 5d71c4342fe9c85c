"""Which clients train in a round depends on the seed alone, not on random node ids."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from strategies.seeded_sampling import SeededSampling
from tests.strategies.in_process_grid import Client, InProcessGrid

CLIENTS = 10


def client_of(partitions: dict[int, int], trained: list[int]) -> Client:
    """Tells its partition when asked, and notes when it trains."""

    def client(content: RecordDict, node: int) -> RecordDict:
        report = ConfigRecord({"partition-id": partitions[node]} if node in partitions else {})
        if not content.array_records:
            return RecordDict({"fl-privacy": report})
        trained.append(partitions.get(node, node))
        arrays = next(iter(content.array_records.values()))
        metrics = MetricRecord({"num-examples": 1})
        return RecordDict({"arrays": arrays, "metrics": metrics, "fl-privacy": report})

    return client


def rounds(
    nodes: list[int], partitions: dict[int, int], seed: int, fraction: float, attempt: int = 1
) -> list[list[int]]:
    trained: list[int] = []
    strategy = SeededSampling(
        FedAvg(fraction_train=1.0, fraction_evaluate=0.0), fraction=fraction, seed=seed
    )
    initial = ArrayRecord({"w": Array(np.zeros(2, dtype=np.float32))})
    grid = InProcessGrid(client_of(partitions, trained), nodes)
    config = ConfigRecord({"attempt": attempt})
    strategy.start(grid, initial, num_rounds=4, train_config=config)
    each = max(1, round(fraction * len(nodes)))
    return [sorted(trained[i : i + each]) for i in range(0, len(trained), each)]


def with_random_ids(seed: int, draw: int, fraction: float = 0.3) -> list[list[int]]:
    """Four rounds of ten clients whose node ids and order are drawn anew."""
    rng = np.random.default_rng(draw)
    nodes = [int(n) for n in rng.choice(10**6, CLIENTS, replace=False)]
    return rounds(nodes, {n: p for p, n in enumerate(nodes)}, seed, fraction)


def test_the_same_seed_chooses_the_same_partitions_whatever_the_node_ids() -> None:
    first = with_random_ids(seed=5, draw=1)
    assert len(first) == 4
    assert first == with_random_ids(seed=5, draw=2)
    assert first != with_random_ids(seed=6, draw=1)
    assert len({tuple(chosen) for chosen in first}) > 1


def test_a_resumed_run_draws_anew() -> None:
    nodes = list(range(CLIENTS))
    partitions = {node: node for node in nodes}
    first, again, resumed = (rounds(nodes, partitions, 5, 0.3, attempt) for attempt in (1, 1, 2))
    assert first == again != resumed


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.3, 3), (0.75, 8), (1.0, 10)])
def test_the_share_is_kept_and_at_least_one_client_trains(fraction: float, count: int) -> None:
    chosen = with_random_ids(seed=0, draw=0, fraction=fraction)
    assert [len(set(c)) for c in chosen] == [count] * 4


def test_every_client_gets_its_turn() -> None:
    seen = {p for seed in range(12) for chosen in with_random_ids(seed, 0) for p in chosen}
    assert seen == set(range(CLIENTS))


def test_clients_that_do_not_tell_are_sampled_by_node_id() -> None:
    nodes = [50, 7, 99, 3]
    assert rounds(nodes, {}, 1, 0.5) == rounds(nodes[::-1], {}, 1, 0.5)

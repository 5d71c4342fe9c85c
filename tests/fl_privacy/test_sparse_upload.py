"""A run with sparse uploads and one without: equal exchanges and aggregates, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from rich.console import Console

from fl_privacy import client_app, server_app
from fl_privacy.component import create
from fl_privacy.inspection import overview
from fl_privacy.recording import Recording
from fl_privacy.settings import RunSettings, Scalar
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import Tensors
from strategies import await_clients
from tests.strategies.in_process_grid import InProcessGrid

CLIENTS = 3
SMALL: dict[str, Scalar] = {"dataset": "digits", "model": "mlp", "batch-size": 8}


class Grid(InProcessGrid):
    """Clients that are our own app."""

    def __init__(self, config: dict[str, Scalar], **node: Scalar) -> None:
        super().__init__(lambda content, node: content, range(CLIENTS))
        self.config, self.node = config, node

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        own: dict[str, Scalar] = {"partition-id": node, "num-partitions": CLIENTS}
        own |= {key.replace("_", "-"): value for key, value in self.node.items()}
        context = Context(
            run_id=1, node_id=node, node_config=own, state=RecordDict(), run_config=self.config
        )
        return client_app.app(message, context)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No waiting for clients; the client sets its process to one thread."""
    monkeypatch.setattr(await_clients, "SETTLED_SECONDS", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Recording]:
    def one(changes: dict[str, Scalar], name: str, **node: Scalar) -> Recording:
        folder = tmp_path / name
        config = RunSettings().model_dump(by_alias=True) | {"out-dir": str(folder), "lr": 0.1}
        config |= {"num-server-rounds": 2, "eval-samples": 8} | changes
        context = Context(
            run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config
        )
        server_app.app(Grid(config, **node), context)
        return Recording(folder / "recording")

    return one


def same(some: Tensors, others: Tensors) -> bool:
    return list(some) == list(others) and all(
        torch.equal(value, others[name]) for name, value in some.items()
    )


@pytest.mark.parametrize(
    ("defense", "payload", "share"),
    [
        ("gradient_compression(rate=0.9)", "sparse-update", 0.15),
        ("each_step(defense='top_k(share=0.01)')", "sparse-update", 0.04),
        ("withhold(layers=('dense1',))", "sparse-update", 0.15),
        ("gaussian_noise(scale=0.1)", "weights", 1.0),
    ],
)
def test_exchanges_and_aggregates_are_equal_bit_for_bit(
    defense: str, payload: str, share: float, run: Callable[..., Recording]
) -> None:
    changes = SMALL | {"client-defense": defense}
    dense = run(changes, "dense")
    sparse = run(changes | {"client-encoding": "sparse"}, "sparse")
    task = create("datasets", "digits").task()

    def model() -> torch.nn.Module:
        made: torch.nn.Module = create("models", "mlp").build(task, seed=0)
        return made

    exchanges = [
        sorted(
            (e for o in ThreatModel().observe(recording, model=model) for e in o.exchanges),
            key=lambda exchange: (exchange.round, exchange.node),
        )
        for recording in (dense, sparse)
    ]
    assert len(exchanges[0]) == 2 * CLIENTS
    for one, other in zip(*exchanges, strict=True):
        assert one.flaw == other.flaw == ""
        assert (one.round, one.node, one.num_examples) == (
            other.round,
            other.node,
            other.num_examples,
        )
        assert one.global_digest == other.global_digest  # so the aggregates are equal, too
        assert same(one.parameters, other.parameters)
        assert same(one.update, other.update)
        assert same(one.returned_buffers, other.returned_buffers)
    entries = [list(recording.entries()) for recording in (dense, sparse)]
    assert {entry.payload for entry in entries[0]} == {"weights"}
    assert {entry.payload for entry in entries[1]} == {payload}
    full, received = (sum(entry.bytes for entry in of) for of in entries)
    assert received <= share * full
    assert sparse.verify() == []


def test_flowers_clipping_comes_before_the_encoding(run: Callable[..., Recording]) -> None:
    """It clips what the defense left, in the client; only then is it encoded."""
    clipping = (
        "client-side-fixed-clipping(noise_multiplier=0, clipping_norm=1e-3, num_sampled_clients=3)"
    )
    changes = SMALL | {"client-defense": "top_k(share=0.05)", "dp-strategy": clipping}
    recording = run(changes | {"client-encoding": "sparse"}, "clipped")
    for entry in recording.entries():
        sent, returned = recording.sent(entry), recording.returned(entry)
        update = torch.cat([(returned[name] - sent[name]).flatten() for name in sent])
        assert float(update.norm()) == pytest.approx(1e-3, rel=1e-2)
        assert entry.payload == "sparse-update"


def shown(recording: Recording) -> str:
    console = Console(width=120, record=True, quiet=False, file=None)
    with console.capture() as captured:
        for table in overview(recording):
            console.print(table)
    return captured.get()


def test_inspect_shows_received_and_dense_sizes(run: Callable[..., Recording]) -> None:
    changes = SMALL | {"client-defense": "top_k(k=5)", "num-server-rounds": 1}
    sparse = run(changes | {"client-encoding": "sparse"}, "sparse")
    (header,) = (line for line in shown(sparse).splitlines() if "if dense" in line)
    count = len(list(sparse.entries()))
    assert f"sparse in {count} of {count}" in shown(sparse)
    assert header.index("size") < header.index("if dense")
    assert "if dense" not in shown(run(changes, "dense"))


def test_encoding_is_the_nodes_own_business(run: Callable[..., Recording]) -> None:
    recording = run(SMALL | {"client-defense": "top_k(k=5)"}, "own", client_encoding="sparse")
    assert {entry.payload for entry in recording.entries()} == {"sparse-update"}
    assert "client-encoding" not in recording.manifest.run_config

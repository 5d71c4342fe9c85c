"""Flower's own differential privacy by a setting: named, validated, and run whole."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import FedAvg

from fl_privacy import client_app, server_app
from fl_privacy.component import ComponentError
from fl_privacy.recording import Recording
from fl_privacy.settings import RunSettings
from strategies import await_clients
from strategies.differential_privacy import (
    dp_strategies,
    refuse_statistics,
    with_differential_privacy,
)
from tests.strategies.in_process_grid import InProcessGrid

NODES = (0, 1)
NORM = 0.01
BASE = {
    **RunSettings().model_dump(by_alias=True),
    "dataset": "digits",
    "model": "mlp(hidden=(4,))",
    "lr": 0.5,
    "batch-size": 8,
    "num-server-rounds": 2,
    "sorted-replies": True,
}
FIXED = f"(noise_multiplier=0.0, clipping_norm={NORM}, num_sampled_clients=2)"
ADAPTIVE = f"(noise_multiplier=0.0, initial_clipping_norm={NORM}, num_sampled_clients=2)"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(await_clients, "SETTLED_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def real_client(config: dict[str, object]) -> Callable[[RecordDict, int], RecordDict]:
    """The real ClientApp of a node, which is also its partition."""

    def answer(content: RecordDict, node: int) -> RecordDict:
        kind = "train" if content.array_records else "query"
        metadata = Metadata(1, "m", 1, node, "", "", 0.0, 3600.0, kind)
        own: dict[str, bool | int | float | str] = {"partition-id": node, "num-partitions": 2}
        context = Context(1, node, own, RecordDict(), dict(config))  # type: ignore[arg-type]
        reply: Message = client_app.app(make_message(metadata, content), context)
        assert not reply.has_error(), reply.error
        return reply.content

    return answer


def run(out: Path, spec: str) -> Recording:
    config = {**BASE, "dp-strategy": spec, "out-dir": str(out)}
    context = Context(1, 0, {}, RecordDict(), dict(config))
    server_app.app(InProcessGrid(real_client(config), NODES), context)
    return Recording(out / "recording")


def norms(recording: Recording, round: int) -> list[float]:
    """Length of each update of a round, as recorded."""
    lengths = []
    for entry in recording.entries(rounds={round}):
        sent, got = recording.sent(entry), recording.returned(entry)
        squares = [(got[name] - sent[name]).double().square().sum() for name in sent]
        lengths.append(float(torch.stack(squares).sum().sqrt()))
    return lengths


def moved(recording: Recording) -> float:
    """How far the global model moved in round 1, as round 2 was sent it."""
    first, second = (recording.sent(next(recording.entries(rounds={round}))) for round in (1, 2))
    squares = [(second[name] - first[name]).double().square().sum() for name in first]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("name", sorted(dp_strategies()))
def test_each_runs_whole_and_the_recorder_keeps_what_the_server_received(
    tmp_path: Path, name: str
) -> None:
    """Clipped to NORM by the client or by the server after it was recorded; no noise."""
    recording = run(tmp_path, name + (FIXED if "fixed" in name else ADAPTIVE))
    lengths = norms(recording, 1)
    assert len(lengths) == len(NODES)
    if name.startswith("client-side"):
        assert lengths == pytest.approx([NORM] * len(NODES), rel=1e-3)
    else:
        assert min(lengths) > 2 * NORM
    assert 0 < moved(recording) <= NORM * 1.001


def test_noise_moves_the_model_by_as_much_as_flower_says(tmp_path: Path) -> None:
    """Noise of noise_multiplier * norm / clients in every weight, far above the clipped mean."""
    spec = "server-side-fixed-clipping(noise_multiplier=20.0, clipping_norm=1.0, "
    recording = run(tmp_path, f"{spec}num_sampled_clients=2)")
    weights = sum(t.numel() for t in recording.sent(next(recording.entries())).values())
    expected = 10.0 * np.sqrt(weights)
    assert moved(recording) == pytest.approx(expected, rel=5 / np.sqrt(2 * weights))


def test_all_four_of_flower_are_offered_and_none_is_a_plain_strategy() -> None:
    assert sorted(dp_strategies()) == [
        f"{side}-side-{kind}-clipping"
        for side in ("client", "server")
        for kind in ("adaptive", "fixed")
    ]
    inner = FedAvg()
    assert with_differential_privacy(inner, " ") is inner


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("central", "no dp-strategy 'central'; there are: client-side-adaptive-clipping, "),
        (f"server-side-fixed-clipping{FIXED[:-1]}, x=1)", "no setting 'x'.*clipping_norm"),
        ("server-side-fixed-clipping(noise_multiplier=1.0)", "needs 'clipping_norm'"),
        ("server-side-fixed-clipping" + FIXED.replace("=0.0,", "=-1.0,"), "non-negative"),
        ("server-side-fixed-clipping" + FIXED.replace("=0.0,", "='a',"), "has to be a number"),
    ],
)
def test_a_wrong_setting_is_refused_with_those_that_exist(spec: str, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        with_differential_privacy(FedAvg(), spec)


def test_a_model_with_statistics_is_refused() -> None:
    refuse_statistics("", ["bn.running_var"])
    with pytest.raises(ComponentError, match=r"statistics of bn as if .* choose a model without"):
        refuse_statistics("server-side-fixed-clipping", ["bn.running_var"])


def test_the_clipping_norm_travels_in_the_message() -> None:
    """What Flower's mods look for; without it they answer with an error, not with weights."""
    config = {**BASE, "dp-strategy": f"client-side-fixed-clipping{FIXED}"}
    state = client_app.open_dataset("digits")
    assert state is not None
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    context = Context(1, 0, {"partition-id": 0, "num-partitions": 2}, RecordDict(), dict(config))
    metadata = Metadata(1, "m", 1, 0, "", "", 0.0, 3600.0, "train")
    reply = client_app.app(make_message(metadata, content), context)
    assert reply.has_error()

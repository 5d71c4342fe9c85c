"""Victims of property inference: what they train on in which round, alone and as Flower clients."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from clients.property_schedule import scheduled
from fl_privacy import preflight
from fl_privacy.client_app import app
from fl_privacy.component import ComponentError, create
from fl_privacy.datasets.arrays import Split
from fl_privacy.datasets.npz import NPZ
from fl_privacy.preflight import REHEARSED_SAMPLES, prepare
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import RunSettings, Scalar, parse_settings
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange, Samples

Send = Callable[..., Message]
Node = Callable[..., Context]

VALUES = torch.tensor([1, 0, 0, -1, 1, 0, 1, 0, 0, -1, 0, 1])
"""Four samples with the property, six without, two unknown."""


def settings(**changes: Scalar) -> RunSettings:
    given: dict[str, Scalar] = {"client_property": "p", "client_property_schedule": "every:3"}
    given |= {"batch_size": 2, **changes}
    return parse_settings({key.replace("_", "-"): value for key, value in given.items()})


def trained_on(told: RunSettings, round: int, *, client: int = 0, seed: int = 0) -> Tensor:
    """Values of the property in what ``scheduled`` lets a client with `VALUES` train on."""
    own = torch.arange(100, 100 + len(VALUES))
    held = Samples(own.float().view(-1, 1), own % 2, {"p": VALUES})
    draws = torch.Generator().manual_seed(seed)
    chosen, samples = scheduled(own, held, told, client, round, draws)
    assert torch.equal(samples.inputs.flatten(), chosen.float())
    assert torch.equal(samples.properties["p"], VALUES[chosen - 100])
    return chosen - 100


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_every_kth_round_is_of_the_property_and_no_round_tells_by_its_size(order: str) -> None:
    told = settings(order=order)
    rounds = [VALUES[trained_on(told, round, seed=round)].tolist() for round in range(1, 8)]
    assert rounds == [[1] * 4 if round % 3 == 1 else [0] * 4 for round in range(1, 8)]


def test_the_samples_of_a_round_are_drawn_anew_from_all_of_their_kind() -> None:
    told = settings()
    draws = [trained_on(told, 2, seed=seed).tolist() for seed in range(40)]
    assert {i for draw in draws for i in draw} == set(torch.nonzero(VALUES == 0).flatten().tolist())
    assert all(len(set(draw)) == 4 for draw in draws)
    assert draws[7] == trained_on(told, 2, seed=7).tolist()


def test_a_property_in_every_round_uses_all_samples_that_have_it() -> None:
    told = settings(client_property_schedule="every:1")
    for round in (1, 2):
        assert VALUES[trained_on(told, round)].tolist() == [1] * 4


@pytest.mark.parametrize("schedule", ["every:3", "mixed"])
def test_clients_that_are_no_victims_never_have_the_property(schedule: str) -> None:
    told = settings(client_property_schedule=schedule, client_victims=2)
    for round in (1, 2):
        assert VALUES[trained_on(told, round, client=2)].tolist() == [0] * 6
    assert (VALUES[trained_on(told, 1, client=1)] == 1).any()


def test_mixed_victims_train_on_all_that_they_have() -> None:
    told = settings(client_property_schedule="mixed")
    assert trained_on(told, 1).tolist() == list(range(len(VALUES)))


def test_without_a_schedule_nothing_changes() -> None:
    own, held = torch.arange(3), Samples(torch.zeros(3, 1), torch.zeros(3))
    told = RunSettings(client_property="p")
    given, samples = scheduled(own, held, told, 0, 1, torch.Generator())
    assert given is own
    assert samples is held


@pytest.mark.parametrize(
    ("changes", "round", "client", "message"),
    [
        ({"batch_size": 5}, 1, 0, "expected 5 or more samples with the property 'p', got 4 of 12"),
        ({"batch_size": 5}, 2, 0, "expected 5 or more samples with the property 'p', got 4 of 12"),
        ({"batch_size": 7}, 2, 3, "expected 7 or more samples without the property 'p', got 6"),
        ({"client_property": "q"}, 1, 0, "no property 'q' in the dataset; expected one of p"),
    ],
)
def test_too_few_samples_and_unknown_properties_are_refused(
    changes: dict[str, Scalar], round: int, client: int, message: str
) -> None:
    with pytest.raises(ComponentError, match=message):
        trained_on(settings(**changes), round, client=client)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"client-property-schedule": "mixed"}, "needs client-property"),
        ({"client-property-schedule": "every:0", "client-property": "p"}, "every:0"),
        ({"client-property-schedule": "5", "client-property": "p"}, "property-schedule"),
        ({"client-victims": 0}, "client-victims"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        parse_settings(config)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 240 tiny images: two classes, and a property that a third of them have."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", 240), ("test", 40)):
        arrays[f"x_{split}"] = rng.random((n, 4, 4), dtype=np.float32)
        arrays[f"y_{split}"] = np.arange(n) % 2
        arrays[f"glasses_{split}"] = (np.arange(n) % 3 == 0).astype(np.int64)
    np.savez(path, allow_pickle=False, **arrays)
    return f"npz(path={str(path)!r}, properties=('glasses_{{split}}',))"


@pytest.fixture
def train(source: str, send: Send, node: Node, tmp_path: Path) -> Callable[..., Message]:
    """``train(round, client, **settings)``: the reply of one of four audited clients."""

    def run(round: int, client: int = 0, **changes: Scalar) -> Message:
        told = RunSettings(
            dataset=source,
            model="mlp(hidden=(5,))",
            batch_size=8,
            audit=True,
            out_dir=str(tmp_path),
            client_property="glasses",
            client_property_schedule="every:5",
        )
        config = told.model_dump(by_alias=True)
        config |= {key.replace("_", "-"): value for key, value in changes.items()}
        model = create("models", told.model).build(create("datasets", source).task(), seed=0)
        sent = ArrayRecord(OrderedDict(model.state_dict()))
        content = RecordDict({"sent": sent, "config": ConfigRecord({"server-round": round})})
        return app(send(content), node(config, partition_id=client))

    return run


def kept(tmp_path: Path, round: int) -> Samples:
    exchange = Exchange(1, round, "7", None, "", "", {}, {}, {}, {})
    return TruthVault(tmp_path / "truth").samples([exchange])


@pytest.mark.parametrize("algorithm", ["fedsgd", "fedavg"])
def test_the_truth_tells_the_property_and_the_reply_does_not(
    algorithm: str, train: Callable[..., Message], tmp_path: Path
) -> None:
    """Rounds with and without the property look alike but for the arrays and the loss."""
    replies = {round: train(round, algorithm=algorithm) for round in (1, 2, 5, 6)}
    for round in replies:
        assert (kept(tmp_path, round).properties["glasses"] == int(round % 5 == 1)).all()
    assert len({r.content.metric_records["metrics"]["num-examples"] for r in replies.values()}) == 1
    for reply in replies.values():
        assert list(reply.content) == ["sent", "metrics", "fl-privacy"]
        assert set(reply.content.metric_records["metrics"]) == {"num-examples", "loss"}
        assert set(reply.content.config_records["fl-privacy"]) == {"partition-id", "code-digest"}


def test_a_client_that_is_no_victim_keeps_samples_without_the_property(
    train: Callable[..., Message], tmp_path: Path
) -> None:
    train(1, client=1, algorithm="fedavg")
    assert (kept(tmp_path, 1).properties["glasses"] == 0).all()


def test_a_round_can_be_repeated_and_others_hold_other_samples(
    train: Callable[..., Message], tmp_path: Path
) -> None:
    batches = []
    for round in (2, 2, 3):
        train(round)
        batches.append(kept(tmp_path, round).inputs)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_property": "glases"}, "'glases'.* did you mean 'glasses'.* one of glasses"),
        (
            {"batch_size": 50},
            r"client 0: expected 50 or more samples with the property 'glasses', got \d+ of 60",
        ),
    ],
)
def test_what_a_client_would_refuse_is_refused_before_the_run(
    changes: dict[str, Scalar], message: str, source: str, tmp_path: Path
) -> None:
    told = settings(dataset=source, model="mlp", client_property="glasses")
    with pytest.raises(ComponentError, match=message):
        prepare(told.model_copy(update=changes), 4, RunFolder(tmp_path))


@pytest.mark.parametrize("attributed", [True, False])
def test_before_the_run_no_picture_is_loaded_to_see_who_has_a_property(
    attributed: bool, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    load = NPZ.load

    def noted(self: NPZ, split: Split, indices: Tensor | None = None) -> Samples:
        loaded.append(240 if indices is None else len(indices))
        return load(self, split, indices)

    monkeypatch.setattr(NPZ, "load", noted)
    if not attributed:
        monkeypatch.setattr(preflight, "Attributed", frozenset)  # which no dataset is
    told = settings(dataset=source, model="mlp", client_property="glasses", batch_size=8)
    prepare(told, 4, RunFolder(tmp_path))
    assert sum(loaded) == REHEARSED_SAMPLES + (0 if attributed else 240)
    with pytest.raises(ComponentError, match="client 0: expected 50 or more"):
        prepare(told.model_copy(update={"batch_size": 50}), 4, RunFolder(tmp_path))

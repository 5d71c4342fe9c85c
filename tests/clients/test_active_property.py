"""The active adversary: its two losses, its memory, and what the joint model tells afterwards."""

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from logging import getLogger
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clients.active_property import HEAD, train_actively, two_heads, with_features
from clients.training import TrainResult, local_train
from fl_privacy.client_app import app
from fl_privacy.component import ComponentError, create
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.models.mlp import MLP
from fl_privacy.preflight import prepare
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import RunSettings, Scalar, parse_settings
from fl_privacy.truth import TruthVault
from fl_privacy.types import Exchange, LocalTraining, Samples, Task

Send = Callable[..., Message]
Node = Callable[..., Context]

TASK = Task(input_shape=(1, 4, 4), classes=3, mean=(0.4,), std=(0.3,))
STEP = LocalTraining(lr=0.5, batch_size=6, order="sequential")


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    return MLP(hidden=(7, 5)).build(TASK, seed=1).double()


def data(property: list[int]) -> Samples:
    n = len(property)
    inputs = torch.rand(n, 1, 4, 4, generator=seeded(9), dtype=torch.float64)
    return Samples(inputs, torch.arange(n) % 3, {"p": torch.tensor(property)})


def play(
    model: nn.Module, samples: Samples, training: LocalTraining, alpha: float, memory: RecordDict
) -> TrainResult:
    return train_actively(
        model,
        TASK,
        samples,
        training,
        name="p",
        alpha=alpha,
        memory=memory,
        seed=3,
        generator=seeded(),
    )


def head_in(memory: RecordDict) -> dict[str, Tensor]:
    return dict(memory.array_records[HEAD].to_torch_state_dict())


def test_one_step_follows_both_losses_by_hand() -> None:
    """-lr (alpha g_main + (1 - alpha) g_property); unknown samples have no part in the latter."""
    samples, alpha = data([1, 0, -1, 0, 1, -1]), 0.3
    model, memory = network(), RecordDict()
    start = deepcopy(model)
    head = two_heads(deepcopy(model), TASK, seed=3).head
    result = play(model, samples, STEP, alpha, memory)

    known = torch.tensor([0, 1, 3, 4])
    told = head(features_of(start, samples.inputs))[known]
    main = F.cross_entropy(start(TASK.normalize(samples.inputs)), samples.labels)
    second = F.cross_entropy(told, samples.properties["p"][known], reduction="sum") / 6
    loss = alpha * main + (1 - alpha) * second
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    names = [name for name, _ in start.named_parameters()]
    parameters = [*start.parameters(), *head.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    after = [*(result.state[name] for name in names), *head_in(memory).values()]
    for value, before, gradient in zip(after, parameters, gradients, strict=True):
        expected = before.detach() - 0.5 * gradient
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert list(result.state) == list(start.state_dict())


def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the classifier sees, layer by layer."""
    values = TASK.normalize(inputs).flatten(1)
    for name in ("dense1", "dense2"):
        values = torch.relu(model.get_submodule(name)(values))
    return values


def test_with_alpha_one_the_model_learns_what_it_would_have_learned() -> None:
    training = LocalTraining(algorithm="fedavg", lr=0.1, momentum=0.9, epochs=2, batch_size=4)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    samples = data([1, 0] * 5)
    samples = Samples(samples.inputs.float(), samples.labels, samples.properties)
    memory = RecordDict()
    plain = local_train(deepcopy(model), TASK, samples, training, generator=seeded())
    active = play(model, samples, training, 1.0, memory)
    assert active.num_examples == plain.num_examples
    for name, value in plain.state.items():
        assert torch.equal(active.state[name], value)


def test_features_are_the_input_of_the_last_layer_whatever_its_kind() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.BatchNorm1d(3)
    )
    inputs = torch.rand(5, 1, 4, 4, generator=seeded())
    _, features = with_features(model, two_heads(model, TASK, seed=0).layer, inputs)
    assert torch.equal(features, torch.relu(model[0](inputs)).flatten(1))


@pytest.mark.parametrize(
    ("hidden", "values", "message"),
    [
        ((), [0, 1], "two or more; choose another model"),
        ((4,), [0, 0, -1], "1 or more samples with the property 'p', got 0 of 3"),
        ((4,), [1, 1, -1], "1 or more samples without the property 'p', got 0 of 3"),
    ],
)
def test_a_second_head_that_could_not_attack_is_refused(
    hidden: tuple[int, ...], values: list[int], message: str
) -> None:
    model = MLP(hidden=hidden).build(TASK, seed=0)
    with pytest.raises(ComponentError, match=message):
        play(model, data(values), STEP, 0.5, RecordDict())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of noise: the class is the sign of one pixel, the property that of another."""
    path = tmp_path_factory.mktemp("data") / "two_signs.npz"
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", 480), ("test", 400)):
        x = rng.normal(size=(n, 3, 3)).astype(np.float32)
        arrays[f"x_{split}"] = x
        arrays[f"y_{split}"] = (x[:, 0, 0] > 0).astype(np.int64)
        arrays[f"p_{split}"] = (x[:, 2, 2] > 0).astype(np.int64)
    np.savez(path, allow_pickle=False, **arrays)
    return f"npz(path={str(path)!r}, properties=('p_{{split}}',))"


@pytest.fixture
def answer(source: str, send: Send, node: Node) -> Callable[..., tuple[Message, Context]]:
    """``answer(round, client, state, context, **settings)``: reply and context of one of four."""

    def run(
        round: int = 1,
        client: int = 3,
        state: dict[str, Tensor] | None = None,
        context: Context | None = None,
        **changes: Scalar,
    ) -> tuple[Message, Context]:
        told = RunSettings(
            dataset=source,
            model="mlp(hidden=(2,))",
            algorithm="fedavg",
            lr=0.2,
            batch_size=10,
            client_property="p",
            client_active_clients=1,
        )
        config = told.model_dump(by_alias=True)
        config |= {key.replace("_", "-"): value for key, value in changes.items()}
        model = create("models", told.model).build(create("datasets", source).task(), seed=0)
        sent = ArrayRecord(OrderedDict(state or model.state_dict()))
        content = RecordDict({"sent": sent, "config": ConfigRecord({"server-round": round})})
        context = context or node(config, partition_id=client)
        return app(send(content), context), context

    return run


Answer = Callable[..., tuple[Message, Context]]


def returned(reply: Message) -> dict[str, Tensor]:
    return dict(reply.content.array_records["sent"].to_torch_state_dict())


def test_only_the_shared_model_leaves_and_the_head_stays_over_the_rounds(answer: Answer) -> None:
    first, context = answer(1)
    kept = head_in(context.state)
    again, _ = answer(2, context=context)
    fresh, _ = answer(2)
    plain, other = answer(1, client=0)
    assert list(returned(first)) == list(returned(plain))
    assert list(first.content) == list(plain.content)
    assert len(other.state) == 0
    assert not torch.equal(head_in(context.state)["weight"], kept["weight"])
    assert not torch.equal(returned(again)["dense1.weight"], returned(fresh)["dense1.weight"])


def test_the_joint_model_tells_the_property_once_an_active_client_has_trained_it(
    answer: Answer, source: str
) -> None:
    """Two features, one of which the class needs: held-out accuracy of a probe on them."""
    told = {}
    for active in (0, 1):
        state, context = None, None
        for round in range(1, 13):
            reply, context = answer(
                round, state=state, context=context, client_active_clients=active
            )
            state = returned(reply)
        told[active] = probe(source, state or {})
    assert told[1] > 0.9
    assert told[1] > told[0] + 0.1


def probe(source: str, state: dict[str, Tensor]) -> float:
    """Accuracy, on the second half of the test split, of a probe fitted on the first."""
    dataset = create("datasets", source)
    model = create("models", "mlp(hidden=(2,))").build(dataset.task(), seed=0)
    model.load_state_dict(state)
    held_out = dataset.load("test")
    with torch.no_grad():
        inputs = dataset.task().normalize(held_out.inputs)
        features = with_features(model, "classifier", inputs)[1].numpy()
    p = held_out.properties["p"].numpy()
    fitted = LogisticRegression(C=100.0, max_iter=1000).fit(features[:200], p[:200])
    return float(fitted.score(features[200:], p[200:]))


def test_an_active_client_is_undefended_unscheduled_and_known_to_the_truth(
    answer: Answer, tmp_path: Path
) -> None:
    answer(
        2,
        audit=True,
        out_dir=str(tmp_path),
        client_defense="gaussian_noise(scale=0.1)",
        client_property_schedule="every:5",
    )
    vault = TruthVault(tmp_path / "truth")
    exchange = Exchange(1, 2, "7", None, "", "", {}, {}, {}, {})
    assert vault.defense(exchange) == ""
    stats = dict(vault.defense_stats(exchange))
    assert stats == {"samples": 120, "partition": 3, "active_alpha": 0.5}
    samples = vault.samples([exchange])
    assert set(samples.properties["p"].tolist()) == {0, 1}
    assert samples.labels.shape == (120,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "logistic"}, "two or more; choose another model"),
        ({"client_property": "q"}, "^client-property: no property 'q' in the.* one of p"),
        (
            {"client_property_schedule": "mixed", "client_victims": 4},
            "client-victims 4 and client-active-clients 1 are more than the 4 clients",
        ),
    ],
)
def test_what_an_active_client_would_refuse_is_refused_before_the_run(
    changes: dict[str, Scalar], message: str, source: str, tmp_path: Path
) -> None:
    told = RunSettings(dataset=source, model="mlp", client_property="p", client_active_clients=1)
    with pytest.raises(ComponentError, match=message):
        prepare(told.model_copy(update=changes), 4, RunFolder(tmp_path))


def test_a_property_that_is_the_main_task_is_refused_and_phi_is_told(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getLogger("flwr"), "propagate", True)
    told = RunSettings(
        dataset=source.replace("'p_", "'y_"),
        model="mlp",
        client_property="y",
        client_active_clients=1,
    )
    with pytest.raises(DatasetError, match="'y' is the main task"):
        prepare(told, 4, RunFolder(tmp_path))
    caplog.set_level("INFO", "flwr")
    prepare(
        told.model_copy(update={"dataset": source, "client_property": "p"}), 4, RunFolder(tmp_path)
    )
    samples = create("datasets", source).load("train")
    expected = np.corrcoef(samples.labels, samples.properties["p"])[0, 1]
    words = f"phi to the main task over the clients' samples {expected:+.3f} (n = 480)"
    assert words in caplog.text


def test_an_active_client_needs_the_name_of_a_property() -> None:
    with pytest.raises(ComponentError, match="client-active-clients needs client-property"):
        parse_settings({"client-active-clients": 1})

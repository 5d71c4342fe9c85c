"""Our mods in a Flower app that has nothing else of ours: its own model, FedAvg, no run config."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import Tensor, nn

from clients.encoding import sparse_upload
from clients.mods import Mod, update_defense_mod
from fl_privacy.component import BUILT_IN, create, find
from fl_privacy.protocols import UpdateDefense
from fl_privacy.sparse import ARRAY, decode
from strategies.decoding import Decoding
from strategies.wrapper import StrategyWrapper
from tests.strategies.in_process_grid import InProcessGrid

LR, NODES, ROUNDS = 0.1, (11, 12, 13), 2
SPECS = {
    "gaussian_noise": "gaussian_noise(scale=0.01)",
    "gradient_compression": "gradient_compression(rate=0.9)",
    "laplace_noise": "laplace_noise(scale=0.01)",
    "top_k": "top_k(k=12)",
    "update_clipping": "update_clipping(max_norm=0.001)",
    "withhold": "withhold(layers=('head',))",
}


class Network(nn.Module):
    """Somebody's network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.body(x))
        return out


def data_of(node: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(node))
    return x, x[:, :3].argmax(1)


def somebodys_app(*mods: Mod) -> ClientApp:
    """One step of SGD, and an evaluation; as in Flower's own examples."""
    app = ClientApp(mods=list(mods))

    def received(message: Message) -> Network:
        model = Network()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        return model

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, (x, y) = received(message), data_of(context.node_id)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        metrics = MetricRecord({"num-examples": len(y), "train_loss": float(loss.detach())})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model, (x, y) = received(message).eval(), data_of(context.node_id)
        loss = float(nn.functional.cross_entropy(model(x), y).detach())
        metrics = MetricRecord({"num-examples": len(y), "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


class AppGrid(InProcessGrid):
    """Hands messages to a client app, evaluation too."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(lambda content, node: content, NODES)
        self.app = app

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        return self.app(message, context)


class Listening(StrategyWrapper):
    """Keeps what was sent and what came back in the last round."""

    def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
        self.sent = dict(arrays.to_torch_state_dict())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        self.replies = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        assert not [reply.error.reason for reply in self.replies if reply.has_error()]
        self.arrays = [r.content.array_records["arrays"].copy() for r in self.replies]
        return super().aggregate_train(server_round, self.replies)


def run(strategy: Strategy, *mods: Mod, rounds: int = ROUNDS) -> Result:
    torch.manual_seed(0)
    start = ArrayRecord(Network().state_dict())
    return strategy.start(AppGrid(somebodys_app(*mods)), start, num_rounds=rounds)


def updates(*mods: Mod) -> list[dict[str, Tensor]]:
    """Returned minus sent, by parameter, of each client in the first round."""
    strategy = Listening(FedAvg())
    run(strategy, *mods, rounds=1)
    states = [arrays.to_torch_state_dict() for arrays in strategy.arrays]
    names = [name for name, _ in Network().named_parameters()]
    return [{n: state[n] - strategy.sent[n] for n in names} for state in states]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in tensors.values()])


def test_every_update_defense_is_tried_here() -> None:
    ours = {n for n in BUILT_IN["defenses"] if hasattr(find("defenses", n), "defend_update")}
    assert ours == set(SPECS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_whole_federation_runs_with_each_and_evaluates(name: str) -> None:
    defense = create("defenses", SPECS[name])
    assert isinstance(defense, UpdateDefense)
    result = run(FedAvg(), update_defense_mod(defense, seed=1))
    plain = run(FedAvg())
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert list(result.arrays) == list(plain.arrays)
    Network().load_state_dict(result.arrays.to_torch_state_dict())
    assert not torch.equal(*(state_of(r)["head.weight"] for r in (result, plain)))


def state_of(result: Result) -> OrderedDict[str, Tensor]:
    return result.arrays.to_torch_state_dict()


def defended(name: str) -> list[dict[str, Tensor]]:
    return updates(update_defense_mod(create("defenses", SPECS[name]), seed=1))


def test_compression_leaves_the_largest_tenth_of_each_update() -> None:
    for before, after in zip(updates(), defended("gradient_compression"), strict=True):
        entries = flat(before).numel()
        kept = flat(after) != 0
        assert int(kept.sum()) == entries - round(0.9 * entries)
        assert flat(before)[~kept].abs().max() <= flat(before)[kept].abs().min()
        torch.testing.assert_close(flat(after)[kept], flat(before)[kept], rtol=0, atol=1e-6)


def test_top_k_leaves_k_entries_of_each_update() -> None:
    assert [int((flat(u) != 0).sum()) for u in defended("top_k")] == [12] * len(NODES)


def test_clipping_bounds_each_update() -> None:
    for before, after in zip(updates(), defended("update_clipping"), strict=True):
        assert float(flat(before).norm()) > 0.01
        assert float(flat(after).norm()) == pytest.approx(0.001, rel=1e-3)


def test_withheld_layers_come_back_as_the_global_values_bit_for_bit() -> None:
    strategy = Listening(FedAvg())
    run(strategy, update_defense_mod(create("defenses", SPECS["withhold"])), rounds=2)
    for arrays in strategy.arrays:
        state = arrays.to_torch_state_dict()
        assert torch.equal(state["head.weight"], strategy.sent["head.weight"])
        assert not torch.equal(state["body.0.weight"], strategy.sent["body.0.weight"])


@pytest.mark.parametrize(
    ("name", "deviation"), [("gaussian_noise", 1.0), ("laplace_noise", 2**0.5)]
)
def test_noise_of_the_stated_scale_is_added(name: str, deviation: float) -> None:
    pairs = zip(updates(), defended(name), strict=True)
    noise = torch.cat([flat(after) - flat(before) for before, after in pairs])
    error = 5 * 0.01 * deviation * (5 / 4 / len(noise)) ** 0.5
    assert abs(float(noise.std()) - 0.01 * deviation) < error


def test_an_unknown_layer_names_those_of_the_app() -> None:
    defense = create("defenses", "withhold(layers=('classifier',))")
    with pytest.raises(ValueError, match=r"no parameter 'classifier'.*body\.0\.weight.*head\.bias"):
        run(FedAvg(), update_defense_mod(defense), rounds=1)


@pytest.mark.parametrize("name", ["gradient_compression", "top_k", "withhold", "update_clipping"])
def test_sparse_uploads_change_nothing_but_the_size(name: str) -> None:
    defense = update_defense_mod(create("defenses", SPECS[name]))
    dense = run(plain := Listening(FedAvg()), defense)
    outer = Listening(FedAvg())
    outer.strategy = Decoding(inner := Listening(FedAvg()))
    sparse = run(outer, sparse_upload, defense)
    for n, array in dense.arrays.items():
        assert array.data == sparse.arrays[n].data
    for ours, theirs in zip(inner.arrays, plain.arrays, strict=True):
        assert {n: a.data for n, a in ours.items()} == {n: a.data for n, a in theirs.items()}
    received = [sum(len(a.data) for a in arrays.values()) for arrays in outer.arrays]
    full = [sum(len(a.data) for a in arrays.values()) for arrays in plain.arrays]
    if name == "update_clipping":
        assert received == full
    else:
        assert all(list(arrays) == [ARRAY] for arrays in outer.arrays)
        assert sum(received) < sum(full) / (1 if name == "withhold" else 2)


def test_a_reply_with_other_tensors_goes_out_as_it_is(
    send: Callable[..., Message], node: Callable[..., Context]
) -> None:
    content = RecordDict({"arrays": ArrayRecord(Network().state_dict()), "c": ConfigRecord()})
    message = send(content)
    for returned in (ArrayRecord({}), ArrayRecord(nn.Linear(2, 2).state_dict())):
        answer = RecordDict({"arrays": returned})

        def call(message: Message, context: Context, answer: RecordDict = answer) -> Message:
            return Message(answer, reply_to=message)

        reply = sparse_upload(message, node(), call)
        assert reply.content.array_records["arrays"] is returned


def test_what_the_app_writes_into_the_message_is_not_taken_for_what_was_sent(
    send: Callable[..., Message], node: Callable[..., Context]
) -> None:
    state = Network().state_dict()
    message = send(RecordDict({"arrays": ArrayRecord(state)}))

    def in_place(message: Message, context: Context) -> Message:
        changed = ArrayRecord(OrderedDict({"head.bias": state["head.bias"] + 1}))
        message.content.array_records["arrays"].update(changed)
        return Message(RecordDict({"w": message.content["arrays"]}), reply_to=message)

    reply = sparse_upload(message, node(), in_place)
    (encoded,) = reply.content.array_records.values()
    sent = {name: value.numpy() for name, value in state.items()}
    restored = decode(sent, encoded[ARRAY].numpy().tobytes())
    for name, value in sent.items():
        assert np.array_equal(restored[name], value + (name == "head.bias"))


def test_the_guides_code_runs() -> None:
    guide = Path(__file__).resolve().parents[2] / "docs" / "defenses.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(guide), "exec"), {"__name__": "guide"})

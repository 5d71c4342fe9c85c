"""Update defenses as Flower mods, on messages made by hand."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Generator, Tensor

from clients.defenses.gaussian_noise import GaussianNoise
from clients.mods import update_defense_mod
from fl_privacy.types import Stats, Tensors

Send = Callable[..., Message]
Node = Callable[..., Context]


class Halving:
    """Sends half of the update."""

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        return {name: value / 2 for name, value in update.items()}, {}


def record(**values: Tensor) -> ArrayRecord:
    return ArrayRecord(OrderedDict((k.replace("__", "."), v) for k, v in values.items()))


SENT = {
    "layer__weight": torch.tensor([[1.0, 2.0]]),
    "norm__running_var": torch.tensor([1.0]),
    "steps": torch.tensor([3]),
}


def answer(message: Message, context: Context) -> Message:
    """A foreign app: adds 4 to everything."""
    (arrays,) = message.content.array_records.values()
    state = {name: value + 4 for name, value in arrays.to_torch_state_dict().items()}
    content = RecordDict({"weights": ArrayRecord(OrderedDict(state))})
    content["metrics"] = MetricRecord({"num-examples": 5})
    return Message(content, reply_to=message)


def test_the_update_is_defended_and_everything_else_passes(send: Send, node: Node) -> None:
    message = send(RecordDict({"arrays": record(**SENT), "config": ConfigRecord({"a": 1})}))
    reply = update_defense_mod(Halving())(message, node(), answer)
    state = reply.content.array_records["weights"].to_torch_state_dict()
    assert state["layer.weight"].tolist() == [[3.0, 4.0]]
    assert state["norm.running_var"].tolist() == [5.0]
    assert state["steps"].tolist() == [7]
    assert list(state) == ["layer.weight", "norm.running_var", "steps"]
    assert reply.content.metric_records["metrics"]["num-examples"] == 5
    assert reply.metadata.reply_to_message_id == "m"


def test_it_works_in_a_client_app(send: Send, node: Node) -> None:
    app = ClientApp(mods=[update_defense_mod(Halving()), update_defense_mod(Halving())])
    app.train()(answer)
    reply = app(send(RecordDict({"arrays": record(**SENT)})), node())
    state = reply.content.array_records["weights"].to_torch_state_dict()
    assert state["layer.weight"].tolist() == [[2.0, 3.0]]


def noisy(send: Send, node: Node, seed: int | None, message_id: str = "m") -> np.ndarray:
    message = send(RecordDict({"arrays": record(**SENT)}), message_id=message_id)
    reply = update_defense_mod(GaussianNoise(scale=1.0), seed=seed)(message, node(), answer)
    return reply.content.array_records["weights"]["layer.weight"].numpy()


def test_noise_repeats_with_a_seed_and_never_without(send: Send, node: Node) -> None:
    assert np.array_equal(noisy(send, node, 3), noisy(send, node, 3))
    assert not np.array_equal(noisy(send, node, 3), noisy(send, node, 4))
    assert not np.array_equal(noisy(send, node, 3), noisy(send, node, 3, message_id="n"))
    assert not np.array_equal(noisy(send, node, None), noisy(send, node, None))


def test_an_error_reply_passes(send: Send, node: Node) -> None:
    message = send(RecordDict({"arrays": record(**SENT)}))

    def fail(message: Message, context: Context) -> Message:
        return Message(Error(code=0, reason="broken"), reply_to=message)

    assert update_defense_mod(Halving())(message, node(), fail).has_error()


def test_two_records_are_refused(send: Send, node: Node) -> None:
    message = send(RecordDict({"a": record(**SENT), "b": record(**SENT)}))
    with pytest.raises(ValueError, match="one ArrayRecord in the message, got 2"):
        update_defense_mod(Halving())(message, node(), answer)


def test_nothing_to_defend_is_an_error_not_a_silent_pass(send: Send, node: Node) -> None:
    message = send(RecordDict({"arrays": record(other=torch.ones(2))}))

    def renamed(message: Message, context: Context) -> Message:
        return Message(RecordDict({"w": record(mine=torch.ones(2))}), reply_to=message)

    with pytest.raises(ValueError, match="sent other, returned mine"):
        update_defense_mod(Halving())(message, node(), renamed)

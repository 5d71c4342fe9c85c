"""Update defenses as ordinary Flower mods, for any app that answers with arrays.

app = ClientApp(mods=[update_defense_mod(GaussianNoise(scale=1e-3), seed=0)])

The first of several mods is the last to see the reply.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType
from torch import Tensor

from clients.defending import defend_update
from fl_privacy.protocols import UpdateDefense
from fl_privacy.seeding import derive_seed

Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]

NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last part of the names PyTorch gives to batch-norm statistics, which are no parameters."""


def update_defense_mod(defense: UpdateDefense, *, seed: int | None = None) -> Mod:
    """A mod that defends the update of each training reply.

    The update is returned minus sent, over arrays of floating-point type that carry the same
    name in the message and in the reply. Batch-norm statistics pass undefended (noise would
    make variances negative), and they tell something about the data. Weights that a model has
    under two names are taken for two, with noise of their own each. Noise comes from the
    operating system's randomness, or from (``seed``, message) for a repeatable experiment.

    Raises:
        ValueError: (from the mod) the message or the reply does not hold one ArrayRecord, or
            they share no floating-point array.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        if not is_training(message):
            return call_next(message, context)
        key, sent = _arrays(message, "message")
        before = sent.to_torch_state_dict()
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        name, arrays = _arrays(reply, "reply")
        after = arrays.to_torch_state_dict()
        names = [n for n, value in after.items() if _defended(n, value, before)]
        if not names:
            raise ValueError(
                f"nothing to defend: {key!r} and {name!r} share no floating-point array of equal "
                f"name and shape; sent {', '.join(before)}, returned {', '.join(after)}"
            )
        generator = torch.Generator().manual_seed(_seed(seed, message, context))
        state, _ = defend_update(before, after, (defense,), names=names, generator=generator)
        reply.content[name] = ArrayRecord(OrderedDict(state))
        return reply

    return mod


def is_training(message: Message) -> bool:
    """Whether a message asks for training (``train`` or ``train.<name>``)."""
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def _arrays(message: Message, what: str) -> tuple[str, ArrayRecord]:
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise ValueError(f"expected one ArrayRecord in the {what}, got {len(records)}")
    return records[0]


def _defended(name: str, value: Tensor, sent: dict[str, Tensor]) -> bool:
    return (
        name in sent
        and value.is_floating_point()
        and value.shape == sent[name].shape
        and name.rpartition(".")[2] not in NORM_STATISTICS
    )


def _seed(seed: int | None, message: Message, context: Context) -> int:
    if seed is None:
        return secrets.randbits(63)
    return derive_seed(seed, message.metadata.message_id, str(context.node_id), "mod")

"""Smaller uploads, as an ordinary Flower mod: only what differs from what was sent.

app = ClientApp(mods=[sparse_upload, update_defense_mod(GradientCompression(rate=0.99))])

The mod comes first in the list: it is the last to see the reply. The server needs the strategy
wrapper `strategies.decoding.Decoding`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message

from clients.mods import Next, is_training
from fl_privacy.sparse import ARRAY, encode


def sparse_upload(message: Message, context: Context, call_next: Next) -> Message:
    """Encode the arrays of a training reply where that is smaller.

    Under defenses that leave many entries of the update at exactly zero (Soteria,
    compression, withheld layers) most values come back as they were sent, and only the others
    travel. Nothing is lost: the server restores the very bits. A reply that has not exactly
    one ArrayRecord, or other tensors than the message, goes out as it is.
    """
    records = list(message.content.array_records.values()) if message.has_content() else []
    if not is_training(message) or len(records) != 1:
        return call_next(message, context)
    sent = dict(records[0])  # the app may write into the record
    reply = call_next(message, context)
    if reply.has_content() and len(reply.content.array_records) == 1:
        key, returned = next(iter(reply.content.array_records.items()))
        reply.content[key] = sparse_if_smaller(sent, returned)
    return reply


def sparse_if_smaller(sent: Mapping[str, Array], returned: ArrayRecord) -> ArrayRecord:
    """``returned`` encoded against ``sent``, as one array of bytes, if that is smaller.

    Smaller than the bare values: to save headers only is not worth it.
    """
    arrays = [*sent.values(), *returned.values()]
    if any(array.stype != "numpy.ndarray" or not array.data for array in arrays):
        return returned
    values = {name: array.numpy() for name, array in returned.items()}
    data = encode({name: array.numpy() for name, array in sent.items()}, values)
    if data is None or len(data) >= sum(value.nbytes for value in values.values()):
        return returned
    return ArrayRecord({ARRAY: Array(np.frombuffer(data, dtype=np.uint8))})

"""Restore sparse replies before any strategy sees them."""

from __future__ import annotations

from collections.abc import Iterable
from logging import getLogger

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from rich.filesize import decimal

from fl_privacy.recording import Arrays
from fl_privacy.sparse import ARRAY, SparseError, decode
from strategies.recorder import UnreadableArraysError, array_of
from strategies.wrapper import StrategyWrapper


class Decoding(StrategyWrapper):
    """Turns replies of `clients.encoding.sparse_upload` into the dense ones they stand for.

    It belongs inside the recorder, which stores replies as received, and around everything
    else. Dense replies pass untouched. One that cannot be decoded becomes an error reply of
    its client: the others count on. Received and restored sizes are measured here, whatever a
    client says, and logged.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self._asked: dict[int, Message] = {}
        self._sent: dict[int, Arrays] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = {message.metadata.dst_node_id: message for message in messages}
        self._sent = {}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        sparse = [i for i, reply in enumerate(replies) if sparse_record(reply)]
        received = sum(_bytes(replies[i]) for i in sparse)
        for i in sparse:
            replies[i] = self._decoded(replies[i])
        restored = sum(_bytes(replies[i]) for i in sparse)
        if sparse:
            getLogger("flwr").info(
                "round %s: %s of %s replies are sparse, %s in the place of %s",
                server_round,
                len(sparse),
                len(replies),
                decimal(received),
                decimal(restored),
            )
        self._asked, self._sent = {}, {}
        return super().aggregate_train(server_round, replies)

    def _decoded(self, reply: Message) -> Message:
        """The dense reply, or an error reply that says what is wrong."""
        key, record = next(iter(reply.content.array_records.items()))
        asked = self._asked.get(reply.metadata.src_node_id)
        try:
            if asked is None:
                raise SparseError("nothing was sent to this client in this round")
            data = array_of(ARRAY, record[ARRAY]).tobytes()
            arrays = decode(self._arrays_sent(asked), data)
        except (SparseError, UnreadableArraysError) as error:
            reason = f"the sparse update cannot be decoded: {error}"
            return Message(Error(0, reason), reply_to=asked or reply)
        reply.content[key] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return reply

    def _arrays_sent(self, message: Message) -> Arrays:
        """The arrays of a message, unpacked once where messages share their records."""
        (record, *more) = message.content.array_records.values()
        if more:
            raise SparseError(f"{1 + len(more)} ArrayRecords were sent, expected one")
        if id(record) not in self._sent:
            self._sent[id(record)] = {name: array_of(name, a) for name, a in record.items()}
        return self._sent[id(record)]


def sparse_record(reply: Message) -> bool:
    """Whether a reply holds one ArrayRecord with nothing but an encoded update."""
    if not reply.has_content():
        return False
    records = list(reply.content.array_records.values())
    return len(records) == 1 and list(records[0]) == [ARRAY]


def _bytes(reply: Message) -> int:
    """Size of the arrays in a reply."""
    if not reply.has_content():
        return 0
    records = reply.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())

"""A grid whose clients are a function: no Ray, no network, the same metadata as Flower's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from threading import Lock
from typing import Any

from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[RecordDict, int], RecordDict]
SUPERLINK = 1


class ClientError(Exception):
    """What a client raises to be reported as an error reply."""


class InProcessGrid(Grid):
    """Answers messages with ``client(content, node)``; an error reply comes from the SuperLink.

    ``order`` permutes the replies of a round, as the network would.
    """

    def __init__(
        self,
        client: Client,
        nodes: Sequence[int],
        order: Callable[[list[Message]], list[Message]] = lambda replies: replies,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK, 1
        self.client = client
        self.nodes = list(nodes)
        self.order = order
        self._ids = count()
        self._sent: dict[str, Message] = {}
        self._lock = Lock()

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            with self._lock:
                ids.append(f"message-{next(self._ids)}")
                message.metadata.__dict__["_message_id"] = ids[-1]
                self._sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            sent = [self._sent.pop(id) for id in message_ids if id in self._sent]
        return self.order([self._reply(message) for message in sent])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message: Message) -> Message:
        try:
            content = self.client(message.content, message.metadata.dst_node_id)
        except ClientError as error:
            return make_message(_from_superlink(message), error=Error(0, str(error)))
        return Message(content, reply_to=message)


def _from_superlink(message: Message) -> Metadata:
    return Metadata(
        run_id=1,
        message_id="",
        src_node_id=SUPERLINK,
        dst_node_id=SUPERLINK,
        reply_to_message_id=message.metadata.message_id,
        group_id=message.metadata.group_id,
        created_at=message.metadata.created_at,
        ttl=message.metadata.ttl,
        message_type=message.metadata.message_type,
    )


def round_in(content: RecordDict) -> int:
    """The round a strategy wrote into a message."""
    config = next(iter(content.config_records.values()), ConfigRecord())
    value = config["server-round"]
    assert isinstance(value, int)
    return value

"""A tap on the grid: records apps whose strategy cannot be wrapped, legacy ones included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fl_privacy.recording import Layout, Manifest, RecordingWriter
from fl_privacy.rounds import parse_rounds
from strategies.recorder import Recorder, Sent

ROUND_KEYS = ("server-round", "server_round")


class _Asked(NamedTuple):
    round: int
    node: int
    sent: Sent


def recorded_app(
    app: ServerApp,
    folder: str | Path,
    manifest: Manifest | None = None,
    *,
    model: nn.Module | None = None,
    patient: bool = True,
    budget: int = 0,
) -> ServerApp:
    """Any ServerApp, of the legacy kind too, recording each run at the grid.

    Args:
        app: what the module called ``app`` so far.
        folder: absolute; each run gets a folder of its own in it, named by its id.
        manifest: what is known of task and training; an attack can be told later.
        model: tells parameters from buffers; without it the recording says "unknown".
        patient: go on without what cannot be stored, as on a full disk.
        budget: bytes that the recording of a run may take; 0 for any number.
    """
    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:
        location = Path(folder) / str(context.run_id) / "recording"
        told = manifest or Manifest()
        with RecordingWriter.open(location, told, patient=patient, budget=budget) as writer:
            app(RecordingGrid(grid, writer, model=model), context)

    return outer


class RecordingGrid(Grid):
    """Hands everything to the inner grid and records training messages on the way.

    Thread-safe: legacy apps call `send_and_receive` once for each client, from a pool.
    The round is read from a ``server-round`` config entry, else from the group id, else 0.

    Args:
        grid: the grid Flower gave to the app.
        writer: the open recording; whoever opened it closes it.
        rounds: such as ``1-5,10``; empty records all.
        max_clients: clients to record in a round, the first ones addressed; 0 records all.
        model: tells parameters from buffers; without it the recording says "unknown".
    """

    def __init__(
        self,
        grid: Grid,
        writer: RecordingWriter,
        *,
        rounds: str = "",
        max_clients: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        if max_clients < 0:
            raise ValueError(f"expected max_clients >= 0 (0: all), got {max_clients}")
        self.grid = grid
        self.recorder = Recorder(writer, Layout.of(model) if model is not None else Layout())
        self.is_recorded = parse_rounds(rounds)
        self.max_clients = max_clients
        self._lock = Lock()
        self._round = 0
        self._nodes: set[int] = set()
        self._pending: dict[str, _Asked] = {}

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        sent = self._sending(messages)
        ids = list(self.grid.push_messages(messages))
        self._wait_for(messages, sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self.grid.pull_messages(message_ids))
        self._received(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        sent = self._sending(messages)
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        self._wait_for(messages, sent)
        self._received(replies)
        with self._lock:  # whoever has not answered by now is not heard any more
            for message in messages:
                self._pending.pop(message.metadata.message_id, None)
        return replies

    def _sending(self, messages: Sequence[Message]) -> list[_Asked | None]:
        """Store what is about to be sent; None for a message that is not recorded."""
        with self._lock:
            return [self._chosen(message) for message in messages]

    def _chosen(self, message: Message) -> _Asked | None:
        round, node = round_of(message), message.metadata.dst_node_id
        if not is_training(message) or not self.is_recorded(round):
            return None
        if round != self._round:
            self._round, self._nodes = round, set()
        if self.max_clients and len(self._nodes | {node}) > self.max_clients:
            return None
        self._nodes.add(node)
        return _Asked(round, node, self.recorder.sent(message.content))

    def _wait_for(self, messages: Sequence[Message], sent: Sequence[_Asked | None]) -> None:
        """Remember messages by the ids they got when they were pushed."""
        with self._lock:
            for message, origin in zip(messages, sent, strict=True):
                if origin:
                    self._pending[message.metadata.message_id] = origin

    def _received(self, replies: Sequence[Message]) -> None:
        writer = self.recorder.writer
        with self._lock:
            answered = [
                (reply, self._pending.pop(reply.metadata.reply_to_message_id, None))
                for reply in replies
            ]
            recorded = [(reply, origin) for reply, origin in answered if origin]
            writer.extend(
                self.recorder.reply(reply, round=origin.round, node=origin.node, sent=origin.sent)
                for reply, origin in recorded
            )
            waiting = {origin.round for origin in self._pending.values()}
            for round in {origin.round for _, origin in recorded} - waiting:
                writer.end_round(round)


def is_training(message: Message) -> bool:
    """Whether a message asks for training (``train`` or ``train.<name>``)."""
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def round_of(message: Message) -> int:
    """The round a message belongs to; 0 when it does not say."""
    for record in message.content.config_records.values():
        for key in ROUND_KEYS:
            value = record.get(key)
            if isinstance(value, int):
                return value
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0

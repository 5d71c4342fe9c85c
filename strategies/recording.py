"""Record every reply of a federation, around any Flower strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fl_privacy.recording import Layout, RecordingWriter, Refusal
from fl_privacy.rounds import parse_rounds
from strategies.recorder import Recorder, Sent
from strategies.screening import Screening
from strategies.wrapper import StrategyWrapper, chain, weight_key


class RecordingStrategy(StrategyWrapper):
    """Writes what each client was sent and what it returned, then lets ``strategy`` work.

    It is the outermost wrapper: replies are written as received, before any other strategy
    (Flower's DP wrappers among them) changes them in place, and passed on in the order of
    arrival. Aggregates are bit-identical to those without it. In a round that is not
    recorded nothing is copied or even looked at.

    Args:
        strategy: any Flower strategy or wrapper.
        writer: the open recording; whoever opened it closes it.
        rounds: such as ``1-5,10``; empty records all.
        max_clients: clients to record in a round, those with the lowest node ids among the
            ones addressed, so that the same clients are linked over rounds; 0 records all.
        model: tells parameters from buffers; without it the recording says "unknown".
    """

    def __init__(
        self,
        strategy: Strategy,
        writer: RecordingWriter,
        *,
        rounds: str = "",
        max_clients: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(strategy)
        if max_clients < 0:
            raise ValueError(f"expected max_clients >= 0 (0: all), got {max_clients}")
        layout = Layout.of(model) if model is not None else Layout()
        self.recorder = Recorder(writer, layout, weight_key(strategy))
        self.is_recorded = parse_rounds(rounds)
        self.max_clients = max_clients
        # what was sent this round; the metadata get their message ids when they are pushed
        self._sent: list[tuple[Metadata, Sent]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        self._sent = []
        if not self.is_recorded(server_round):
            return messages
        messages = list(messages)
        chosen = self._chosen(messages)
        self._sent = [
            (message.metadata, self.recorder.sent(message.content))
            for message in messages
            if message.metadata.dst_node_id in chosen
        ]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        numbers: dict[int, int] = {}
        if self.is_recorded(server_round):
            replies = list(replies)
            numbers = self._record(server_round, replies)
        try:
            return super().aggregate_train(server_round, replies)
        finally:
            self._record_refusals(server_round, numbers)

    def _chosen(self, messages: Sequence[Message]) -> set[int]:
        nodes = sorted({message.metadata.dst_node_id for message in messages})
        return set(nodes[: self.max_clients] if self.max_clients else nodes)

    def _record(self, server_round: int, replies: Sequence[Message]) -> dict[int, int]:
        """Write replies; the number of each, by the ``id()`` of its message."""
        writer = self.recorder.writer
        answered = list(self._origins(replies))
        entries = writer.extend(
            self.recorder.reply(reply, round=server_round, node=node, sent=sent)
            for reply, (node, sent) in answered
        )
        writer.end_round(server_round)
        self._sent = []
        return {id(reply): entry.n for (reply, _), entry in zip(answered, entries, strict=True)}

    def _record_refusals(self, server_round: int, numbers: Mapping[int, int]) -> None:
        """Write which replies were kept out of the aggregate, and why."""
        writer = self.recorder.writer
        writer.put_refusals(
            Refusal(
                attempt=writer.attempt,
                round=server_round,
                n=numbers.get(refusal.message),
                node=str(refusal.node),
                reason=refusal.reason,
            )
            for inner in chain(self.strategy)
            if isinstance(inner, Screening)
            for refusal in inner.refusals
        )

    def _origins(self, replies: Sequence[Message]) -> Iterator[tuple[Message, tuple[int, Sent]]]:
        """Each reply to be recorded, with the node that was asked and what it was sent.

        An "unavailable" reply names the SuperLink as its source: what it answers counts.
        """
        by_id = {m.message_id: (m.dst_node_id, sent) for m, sent in self._sent}
        by_id.pop("", None)
        by_node = {m.dst_node_id: (m.dst_node_id, sent) for m, sent in self._sent}
        for reply in replies:
            origin = by_id.get(reply.metadata.reply_to_message_id)
            origin = origin or by_node.get(reply.metadata.src_node_id)
            if origin:
                yield reply, origin

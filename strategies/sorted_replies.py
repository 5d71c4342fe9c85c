"""Aggregate replies in a fixed order, so that floating-point sums are reproducible."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord

from strategies.wrapper import StrategyWrapper

RECORD = "fl-privacy"
PARTITION_KEY = "partition-id"


class SortedReplies(StrategyWrapper):
    """Sorts replies by the partition id that clients report.

    Clients report it in a ConfigRecord ``fl-privacy`` under ``partition-id``; those that do
    not come last, by node id (which a simulation draws anew each time).
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, sorted(replies, key=reply_order))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return super().aggregate_evaluate(server_round, sorted(replies, key=reply_order))


def reply_order(reply: Message) -> tuple[int, int]:
    """Sort key of a reply: reported partitions first, then the others by node id."""
    if reply.has_content():
        record = reply.content.config_records.get(RECORD)
        partition = record.get(PARTITION_KEY) if record else None
        if isinstance(partition, int):
            return 0, partition
    return 1, reply.metadata.src_node_id

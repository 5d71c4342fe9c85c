"""Refuse clients that run other code than the server.

In a simulation, Ray workers put their working directory before the app bundle on the
import path: an old copy of the packages there would be used in silence.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from strategies.wrapper import StrategyWrapper


class CodeMismatchError(RuntimeError):
    """A client runs other code than the server."""


class SameCode(StrategyWrapper):
    """Compares the code digest that clients report with the server's own.

    Replies that report none (other apps) and errors pass.
    """

    def __init__(self, inner: Strategy, digest: str) -> None:
        super().__init__(inner)
        self.digest = digest

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, then delegate.

        Raises:
            CodeMismatchError: naming the client and both digests.
        """
        replies = list(replies)
        for reply in replies:
            got = reported_digest(reply)
            if got not in (None, self.digest):
                raise CodeMismatchError(
                    f"client {reply.metadata.src_node_id} runs other code (digest {got[:12]}) than "
                    f"the server ({self.digest[:12]}): another copy of these packages comes first "
                    f"on its import path. Start Flower from a folder without a copy, or use "
                    f"fl-privacy simulate"
                )
        return super().aggregate_train(server_round, replies)


def reported_digest(reply: Message) -> str | None:
    """The ``code-digest`` in the ConfigRecord ``fl-privacy`` of a reply, if it has one."""
    if reply.has_error():
        return None
    record = reply.content.config_records.get("fl-privacy")
    digest = record.get("code-digest") if record is not None else None
    return digest if isinstance(digest, str) else None

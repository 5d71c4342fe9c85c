"""Leave out clients that run other code than the server.

In a simulation, Ray workers put their working directory before the app bundle on the
import path: an old copy of the packages there would be used in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from logging import getLogger

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fl_privacy.printable import plain
from strategies.wrapper import StrategyWrapper


class CodeMismatchError(RuntimeError):
    """No client runs the server's code."""


class SameCode(StrategyWrapper):
    """Compares the code digest that clients report with the server's own.

    Replies with another digest are dropped and logged: one client must not stop the run. Replies
    that report none (other apps) and errors pass.
    """

    def __init__(self, inner: Strategy, digest: str) -> None:
        super().__init__(inner)
        self.digest = digest

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drop, then delegate.

        Raises:
            CodeMismatchError: nothing but errors is left; names a client and both digests.
        """
        kept: list[Message] = []
        mismatches: list[str] = []
        for reply in replies:
            got = reported_digest(reply)
            if got in (None, self.digest):
                kept.append(reply)
            else:
                mismatches.append(self._mismatch(reply, got))
                getLogger("flwr").warning("%s; its reply is left out", mismatches[-1])
        if mismatches and all(reply.has_error() for reply in kept):
            raise CodeMismatchError(
                f"{mismatches[0]}: another copy of these packages comes first on its import path. "
                f"Start Flower from a folder without a copy, or use fl-privacy simulate"
            )
        return super().aggregate_train(server_round, kept)

    def _mismatch(self, reply: Message, got: str) -> str:
        return (
            f"client {reply.metadata.src_node_id} runs other code (digest {plain(got[:12])}) than "
            f"the server ({self.digest[:12]})"
        )


def reported_digest(reply: Message) -> str | None:
    """The ``code-digest`` in the ConfigRecord ``fl-privacy`` of a reply, if it has one."""
    if reply.has_error():
        return None
    record = reply.content.config_records.get("fl-privacy")
    digest = record.get("code-digest") if record is not None else None
    return digest if isinstance(digest, str) else None

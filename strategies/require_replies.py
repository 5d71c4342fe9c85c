"""Stop a run in which every client fails, instead of ending it with the model unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_privacy.printable import plain
from strategies.wrapper import StrategyWrapper

SHOWN = 3


class RequireReplies(StrategyWrapper):
    """Raises when no client of a training round returned anything usable.

    It belongs inside the recorder, so that the errors are recorded first.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self._expected = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._expected = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, then aggregate.

        Raises:
            RuntimeError: all clients failed; names the first errors.
        """
        replies = list(replies)
        if self._expected and all(reply.has_error() for reply in replies):
            raise RuntimeError(
                f"round {server_round}: none of {self._expected} clients returned an update; "
                f"{first_errors(replies)}"
            )
        return super().aggregate_train(server_round, replies)


def first_errors(replies: Sequence[Message]) -> str:
    """The distinct reasons of failed replies, a few of them, on one line."""
    if not replies:
        return "no reply arrived in time; check that the clients run, or allow them more time"
    reasons = dict.fromkeys(
        " ".join(plain(reply.error.reason or f"error code {reply.error.code}").split())
        for reply in replies
    )
    shown = "; ".join(list(reasons)[:SHOWN])
    more = len(reasons) - SHOWN
    return f"they report: {shown}" + (f" (and {more} more)" if more > 0 else "")

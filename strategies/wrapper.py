"""A strategy around a strategy: the base of everything that watches or reorders replies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy


class StrategyWrapper(Strategy):
    """Hands everything to the inner strategy; subclasses change one thing.

    The inner one is called ``strategy``, as in Flower's own DP wrappers.

    Args:
        strategy: any Flower strategy that leaves ``start`` alone (all of Flower's do).

    Raises:
        ValueError: the inner strategy has a ``start`` of its own, which a wrapper would skip.
    """

    def __init__(self, strategy: Strategy) -> None:
        if type(strategy).start is not Strategy.start:
            raise ValueError(
                f"{type(strategy).__name__} has a start() of its own, which a wrapper would skip; "
                f"use RecordingGrid to record it"
            )
        self.strategy = strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()


def chain(strategy: Strategy | None) -> Iterator[Strategy]:
    """A strategy and all it wraps, outermost first (ours and Flower's wrappers)."""
    while strategy is not None:
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def weight_key(strategy: Strategy) -> str:
    """The metric by which ``strategy`` or what it wraps weights replies; empty if none."""
    keys = (getattr(inner, "weighted_by_key", "") for inner in chain(strategy))
    return next((str(key) for key in keys if key), "")

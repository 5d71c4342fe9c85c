"""Wait for clients before each round, and end the run when they do not come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from logging import getLogger

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.wrapper import StrategyWrapper

SETTLED_SECONDS = 0.5
"""The first round starts when no new client has connected for this long."""
TOLD_SECONDS = 10.0


class AwaitClients(StrategyWrapper):
    """Starts a round when enough clients are connected; Flower itself would wait for ever for some.

    Clients come one by one, and Flower samples whoever is there: the first round also waits
    until no more come.

    Args:
        strategy: the inner strategy.
        wanted: clients that a round takes.
        seconds: how long a round waits for them.
    """

    def __init__(self, strategy: Strategy, *, wanted: int, seconds: float) -> None:
        super().__init__(strategy)
        self.wanted = wanted
        self.seconds = seconds
        self._settled = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait, then configure.

        Raises:
            RuntimeError: too few clients in time.
        """
        self._wait(server_round, grid)
        return super().configure_train(server_round, arrays, config, grid)

    def _wait(self, server_round: int, grid: Grid) -> None:
        settle = 0.0 if self._settled else SETTLED_SECONDS
        start = since = time.monotonic()
        count, told = -1, start - TOLD_SECONDS
        while True:
            now, connected = time.monotonic(), len(list(grid.get_node_ids()))
            if connected != count:
                count, since = connected, now
            if count >= self.wanted and now - since >= settle:
                self._settled = True
                return
            if now - start >= self.seconds:
                if count >= self.wanted:  # more come, and go, all the time
                    return
                raise RuntimeError(
                    f"round {server_round}: {count} of {self.wanted} clients connected within "
                    f"{self.seconds:g} s; start the missing SuperNodes and resume the run, or "
                    f"allow fewer clients (min-clients) or more time (wait-seconds)"
                )
            if count < self.wanted and now - told >= TOLD_SECONDS:
                getLogger("flwr").info("%s of %s clients connected, waiting", count, self.wanted)
                told = now
            time.sleep(0.05 if now - start < 5 else 0.5)

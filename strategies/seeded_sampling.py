"""Choose each round's clients by seed, since Flower samples from the unseeded global generator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_privacy.seeding import generator
from strategies.sorted_replies import reply_order
from strategies.wrapper import StrategyWrapper


class SeededSampling(StrategyWrapper):
    """Keeps of the inner strategy's messages those to the clients drawn by seed,
    attempt (in the train config; 1 without) and round.

    The inner strategy has to address every client (``fraction_train=1``). Node ids are
    random in a simulation, so the draw is over partition ids, which each client is asked
    for once; clients that do not tell are ordered by node id, behind the others.

    Args:
        strategy: the inner strategy.
        fraction: share of the clients to train in a round; at least one is chosen.
        seed: seed of the run.
    """

    def __init__(self, strategy: Strategy, *, fraction: float, seed: int) -> None:
        super().__init__(strategy)
        self.fraction = fraction
        self.seed = seed
        self._order: dict[int, tuple[int, int]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        nodes = [message.metadata.dst_node_id for message in messages]
        self._ask([node for node in nodes if node not in self._order], grid)
        nodes.sort(key=self._order.__getitem__)
        attempt = config.get("attempt", 1)
        draw = generator(self.seed, str(attempt), server_round, "sampled clients")
        count = max(1, round(self.fraction * len(nodes)))
        chosen = {nodes[i] for i in torch.randperm(len(nodes), generator=draw)[:count].tolist()}
        return [message for message in messages if message.metadata.dst_node_id in chosen]

    def _ask(self, nodes: Sequence[int], grid: Grid) -> None:
        """Learn the partition ids of new nodes."""
        self._order.update({node: (1, node) for node in nodes})
        if not nodes:
            return
        questions = [
            Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node)
            for node in nodes
        ]
        for reply in grid.send_and_receive(questions):
            if reply.has_content():
                self._order[reply.metadata.src_node_id] = reply_order(reply)

"""Messages and contexts made by hand: what a Flower run would hand to a client."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.app.user_config import UserConfig

Send = Callable[..., Message]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The client sets its process to one thread; this process goes on as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def send() -> Send:
    """``send(content, kind)``: a message of the server to node 7."""

    def make(content: RecordDict, kind: str = "train", message_id: str = "m") -> Message:
        metadata = Metadata(
            run_id=1,
            message_id=message_id,
            src_node_id=1,
            dst_node_id=7,
            reply_to_message_id="",
            group_id="",
            created_at=0.0,
            ttl=3600.0,
            message_type=kind,
        )
        return cast(Any, Message)(content=content, metadata=metadata)  # type: ignore[no-any-return]

    return make


@pytest.fixture
def node() -> Callable[..., Context]:
    """``node(run_config, **node_config)``: the context of node 7, partition 0 of 4."""

    def make(
        run_config: UserConfig | None = None,
        **node_config: bool | int | float | str,
    ) -> Context:
        own: UserConfig = {"partition-id": 0, "num-partitions": 4}
        own |= {key.replace("_", "-"): value for key, value in node_config.items()}
        return Context(
            run_id=1, node_id=7, node_config=own, state=RecordDict(), run_config=run_config or {}
        )

    return make

"""The Flower client: trains on its partition, defends itself, and, in an audit, keeps the truth.

Every draw comes from (seed, round, partition, purpose), so a round can be repeated in any
process. PyTorch runs on one thread: the same sums in the same order wherever Ray or a
SuperNode starts the process, and clients side by side do not fight for the cores.

The client's defense is its own business: a ``client-...`` key of the node config takes
precedence over the run config.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache, lru_cache
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from clients.defending import defend_update, split_defenses
from clients.training import evaluate_model, local_train
from fl_privacy.code_digest import code_digest
from fl_privacy.component import ComponentError, create, create_all
from fl_privacy.protocols import Dataset, Model, Partition
from fl_privacy.seeding import generator
from fl_privacy.settings import RunSettings, parse_settings
from fl_privacy.truth import TruthVault
from fl_privacy.types import Samples

app = ClientApp()

REPORT = "fl-privacy"
"""Name of the ConfigRecord in which a client says who it is and which code it runs."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer the sent parameters with the locally trained, possibly defended ones."""
    torch.set_num_threads(1)
    settings, client, clients = client_settings(context), *partition_of(context)
    dataset = open_dataset(settings.dataset)
    indices = partition_indices(
        settings.dataset, settings.partition, client, clients, settings.seed
    )
    key, model, sent = received_model(message, settings, dataset)
    audit = Audit.of(message, context, settings)
    spec = settings.client_defense if client < settings.client_defended_share * clients else ""
    gradient_defense, update_defenses = split_defenses(create_all("defenses", spec))
    seeds = (settings.seed, audit.round, client)
    result = local_train(
        model,
        dataset.task(),
        dataset.load("train", indices),
        settings.local_training,
        generator=generator(*seeds, "batches"),
        gradient_defense=gradient_defense,
        defense_generator=generator(*seeds, "gradient-defense"),
        on_step=lambda step, batch, chosen: audit.keep(step, batch, indices[chosen]),
        device=best_device(),
    )
    state, stats = defend_update(
        sent,
        result.state,
        update_defenses,
        names=[name for name, _ in model.named_parameters()],
        generator=generator(*seeds, "update-defense"),
    )
    audit.keep_defense(spec, {**result.stats, **stats})
    metrics = {"num-examples": result.num_examples, "loss": result.loss}
    content = RecordDict({key: ArrayRecord(OrderedDict(state)), "metrics": MetricRecord(metrics)})
    content[REPORT] = ConfigRecord({"partition-id": client, "code-digest": code_digest()})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss and accuracy of the sent parameters on this client's share of the test split."""
    torch.set_num_threads(1)
    settings, client, clients = client_settings(context), *partition_of(context)
    dataset = open_dataset(settings.dataset)
    _, model, _ = received_model(message, settings, dataset)
    share = torch.arange(client, len(dataset.labels("test")), clients)
    samples = dataset.load("test", share)
    loss, accuracy = evaluate_model(model, dataset.task(), samples, device=best_device())
    metrics = {"num-examples": len(samples), "loss": loss, "accuracy": accuracy}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class Audit:
    """Where one client's training in one round keeps its truth; nowhere without an audit."""

    def __init__(self, vault: TruthVault | None, attempt: int, server_round: int, node: str):
        self.vault, self.attempt, self.round, self.node = vault, attempt, server_round, node

    @classmethod
    def of(cls, message: Message, context: Context, settings: RunSettings) -> Audit:
        """Read round and attempt from the message.

        Raises:
            ComponentError: an audit without an absolute out-dir.
        """
        configs = list(message.content.config_records.values())
        config = configs[0] if configs else {}
        vault = None
        if settings.audit:
            out_dir = Path(settings.out_dir)
            if not out_dir.is_absolute():
                raise ComponentError(
                    f"an audit needs an absolute out-dir, got {settings.out_dir!r}"
                )
            vault = TruthVault(out_dir / "truth")
        attempt, server_round = config.get("attempt", 1), config.get("server-round", 0)
        return cls(vault, cast(int, attempt), cast(int, server_round), str(context.node_id))

    def keep(self, step: int, batch: Samples, indices: Tensor) -> None:
        """Store the batch of one step."""
        if self.vault is not None:
            self.vault.write(
                attempt=self.attempt,
                round=self.round,
                node=self.node,
                step=step,
                samples=batch,
                indices=indices,
            )

    def keep_defense(self, spec: str, stats: dict[str, float]) -> None:
        """Store which defense ran and what it reports."""
        if self.vault is not None:
            self.vault.write_defense(
                attempt=self.attempt, round=self.round, node=self.node, spec=spec, stats=stats
            )


def client_settings(context: Context) -> RunSettings:
    """The run config, overridden by the node's own ``client-...`` keys."""
    own = {k: v for k, v in context.node_config.items() if k.startswith("client-")}
    return parse_settings({**context.run_config, **own})


def partition_of(context: Context) -> tuple[int, int]:
    """Which partition of how many this node holds.

    Raises:
        ComponentError: the node config does not say.
    """
    node = context.node_config
    missing = {"partition-id", "num-partitions"} - node.keys()
    if missing:
        raise ComponentError(
            f"the node config lacks {', '.join(sorted(missing))}, got {dict(node)}; start the "
            f'SuperNode with --node-config "partition-id=0 num-partitions=2"'
        )
    return int(node["partition-id"]), int(node["num-partitions"])


@cache
def open_dataset(spec: str) -> Dataset:
    """The dataset of a spec, once a process: Ray reuses its workers."""
    return cast(Dataset, create("datasets", spec))


@lru_cache(maxsize=1024)
def partition_indices(dataset: str, partition: str, client: int, clients: int, seed: int) -> Tensor:
    """Training indices of one client, ``[n]``; remembered, as rounds repeat."""
    share = cast(Partition, create("partitions", partition))
    labels = open_dataset(dataset).labels("train")
    return share.indices(labels, client, clients, seed=seed)


def received_model(
    message: Message, settings: RunSettings, dataset: Dataset
) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Name of the only ArrayRecord, a model with its values, and a copy of the values sent.

    Raises:
        ValueError: not exactly one ArrayRecord, or arrays that do not fit the model.
    """
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise ValueError(f"expected one ArrayRecord in the message, got {len(records)}")
    key, arrays = records[0]
    model = cast(Model, create("models", settings.model)).build(dataset.task(), seed=settings.seed)
    try:
        model.load_state_dict(arrays.to_torch_state_dict())
    except RuntimeError as error:
        raise ValueError(f"the server's arrays do not fit {settings.model}: {error}") from None
    return key, model, {name: value.clone() for name, value in model.state_dict().items()}


def best_device() -> torch.device:
    """The GPU that Flower granted this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

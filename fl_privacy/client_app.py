"""The Flower client: trains on its partition, defends itself, and, in an audit, keeps the truth.

Every draw comes from (seed, attempt, round, partition, purpose), so a round can be repeated in any
process. PyTorch runs on one thread: the same sums in the same order wherever Ray or a
SuperNode starts the process, and clients side by side do not fight for the cores.

The client's defense is its own business: a ``client-...`` key of the node config takes
precedence over the run config, and with a ``client-defense`` there all such keys of the run
config are ignored. Such a defense draws from the operating system's randomness instead: the
server knows the run's seed and could subtract noise that came from it. So do the batches of
DP-SGD, whose guarantee counts on the server not knowing who is in them.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from clients.active_property import HEAD, active_training
from clients.defending import defend_update, with_aliases
from clients.encoding import sparse_upload
from clients.flower_clipping import clipping_mod
from clients.mods import Next
from clients.private_training import noise_of, take_part, without_statistics
from clients.property_schedule import scheduled
from clients.round_trip import round_trip_of, told_task
from clients.training import evaluate_model, local_train
from fl_privacy.code_digest import code_digest
from fl_privacy.component import ComponentError, create, create_all
from fl_privacy.defenses import split_defenses
from fl_privacy.layers import trained_names
from fl_privacy.privacy_spent import PrivacySpent
from fl_privacy.protocols import Dataset, Model, Partition
from fl_privacy.seeding import derive_seed, generator
from fl_privacy.settings import RunSettings, parse_settings

app = ClientApp()

REPORT = "fl-privacy"
"""Name of the ConfigRecord in which a client says which partition and which code it runs."""


def upload(message: Message, context: Context, call_next: Next) -> Message:
    """Encode the reply as ``client-encoding`` says; the outermost mod, so the last to see it."""
    if client_settings(context).client_encoding == "sparse":
        return sparse_upload(message, context, call_next)
    return call_next(message, context)


@app.train(mods=[upload, clipping_mod])
def train(message: Message, context: Context) -> Message:
    """Answer the sent parameters with the locally trained, possibly defended ones."""
    torch.set_num_threads(1)
    settings, (client, clients) = client_settings(context), partition_of(context)
    trip = round_trip_of(message, context, settings)
    active = settings.is_active(client, clients)
    defends = client < settings.defended(clients) and not active
    spec = settings.client_defense if defends else ""
    gradient_defense, update_defenses = split_defenses(create_all("defenses", spec))
    dataset = open_dataset(settings.client_dataset or settings.dataset)
    key, model, sent = received_model(message, settings, dataset)
    own = own_indices(settings, client, clients)
    seeds = (settings.seed, trip.attempt, trip.round, client)
    samples = dataset.load("train", own)
    if not active:
        draws = generator(*seeds, "property-schedule")
        own, samples = scheduled(own, samples, settings, client, trip.round, draws)
    hidden = (secrets.randbits(63),) if "client-defense" in context.node_config else seeds
    folder = state_folder(settings, context)
    gradient_defense, spent = take_part(gradient_defense, settings, samples=len(own), folder=folder)
    defense_generator = generator(*hidden, "gradient-defense")
    trainer = (
        active_training(settings, context.state, seed=derive_seed(settings.seed, client, HEAD))
        if active
        else partial(
            local_train, gradient_defense=gradient_defense, defense_generator=defense_generator
        )
    )
    result = trainer(
        model,
        told_task(message, dataset.task()),
        samples,
        settings.local_training,
        generator=generator(*(hidden if spent else seeds), "batches"),
        on_step=lambda step, batch, chosen: trip.keep(step, batch, own[chosen]),
        device=best_device(),
    )
    names = trained_names(model)
    trained = without_statistics(result.state, sent, names) if spent else result.state
    state, stats = defend_update(
        sent,
        trained,
        update_defenses,
        names=names,
        generator=generator(*hidden, "update-defense"),
    )
    privacy = epsilon_and_delta(spent)
    told = {**privacy, **noise_of(gradient_defense), "samples": len(own), "partition": client}
    told |= {"active_alpha": settings.client_active_alpha} if active else {}
    trip.keep_defense(spec, {**result.stats, **stats, **told})
    reply = RecordDict({key: ArrayRecord(OrderedDict(with_aliases(state, model)))})
    loss = math.nan if spent else result.loss  # it has no noise, so DP-SGD keeps it
    reply["metrics"] = MetricRecord({"num-examples": result.num_examples, "loss": loss})
    reply[REPORT] = own_report(client)
    if settings.client_report_epsilon:
        reply[REPORT] = ConfigRecord({**dict(own_report(client)), **privacy})
    return Message(reply, reply_to=message)


def epsilon_and_delta(spent: PrivacySpent | None) -> dict[str, float]:
    """The guarantee so far, by name; empty for a client without DP-SGD."""
    if spent is None or spent.delta is None:
        return {}
    epsilon = math.inf if spent.epsilon is None else spent.epsilon
    return {"epsilon": epsilon, "delta": spent.delta}


def state_folder(settings: RunSettings, context: Context) -> Path | None:
    """Where a client keeps what outlives its process; None when no setting says.

    Each partition has a folder of its own: below ``client-state-dir``, or, where the defense
    comes from the run config as in a simulation, below ``out-dir``/clients.

    Raises:
        ComponentError: the path is relative.
    """
    root = settings.client_state_dir
    if not root and settings.out_dir and "client-defense" not in context.node_config:
        root = f"{settings.out_dir}/clients"
    if root and not Path(root).is_absolute():
        raise ComponentError(f"client-state-dir (or out-dir) must be absolute, got {root!r}")
    return Path(root) / str(partition_of(context)[0]) if root else None


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which partition this client holds, and which code it runs."""
    client, _ = partition_of(context)
    return Message(RecordDict({REPORT: own_report(client)}), reply_to=message)


def own_report(client: int) -> ConfigRecord:
    """What a client says of itself in every reply."""
    return ConfigRecord({"partition-id": client, "code-digest": code_digest()})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss and accuracy of the sent parameters on this client's share of the test split.

    Client p of N has every N-th test sample from p on, and at least one; of a dataset of its own
    it has all.
    """
    torch.set_num_threads(1)
    settings, (client, clients) = client_settings(context), partition_of(context)
    dataset = open_dataset(settings.client_dataset or settings.dataset)
    if settings.client_dataset:
        client, clients = 0, 1
    _, model, _ = received_model(message, settings, dataset)
    n = len(dataset.labels("test"))
    samples = dataset.load("test", torch.arange(client % n, n, clients))
    task = told_task(message, dataset.task())
    loss, accuracy = evaluate_model(model, task, samples, device=best_device())
    metrics = MetricRecord({"num-examples": len(samples), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def client_settings(context: Context) -> RunSettings:
    """The run config, overridden by the node's own ``client-...`` keys.

    A node with a ``client-defense`` of its own takes no such key from the run config: the
    server could turn the defense off, or say where the account of its privacy lies.
    """
    own = {k: v for k, v in context.node_config.items() if k.startswith("client-")}
    run = dict(context.run_config)
    if "client-defense" in own:
        run = {k: v for k, v in run.items() if not k.startswith("client-")}
    return parse_settings({**run, **own})


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


def own_indices(settings: RunSettings, client: int, clients: int) -> Tensor:
    """Training indices of a client, ``[n]``: its partition, or all of a dataset of its own."""
    if settings.client_dataset:
        return torch.arange(len(open_dataset(settings.client_dataset).labels("train")))
    return partition_indices(settings.dataset, settings.partition, client, clients, settings.seed)


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

"""What is checked and fetched before a simulation starts: refusal comes before work."""

from __future__ import annotations

import os
import socket
from logging import getLogger
from typing import cast

import torch
from torch import Tensor

from clients.active_property import refuse_one_kind, two_heads
from clients.defending import defend_update
from clients.private_training import rehearsed_privacy
from clients.property_schedule import refuse_schedule, values_of
from clients.round_trip import refuse_proximal_term
from clients.training import draw_batches, local_train
from fl_privacy.component import ComponentError, create, create_all
from fl_privacy.datasets.properties import check_property, tell_relation
from fl_privacy.defenses import split_defenses
from fl_privacy.layers import trained_names
from fl_privacy.protocols import Attributed, Costly, Dataset, Model, Partition
from fl_privacy.recording_opening import check_same
from fl_privacy.recording_store import open_store
from fl_privacy.run_folder import RunFolder
from fl_privacy.run_manifest import manifest_of
from fl_privacy.seeding import generator
from fl_privacy.settings import RunSettings
from fl_privacy.superlink import SimulationError
from fl_privacy.types import Samples
from strategies.differential_privacy import refuse_statistics, with_differential_privacy
from strategies.flower import flower_strategy

REHEARSED_SAMPLES = 4
"""Enough for batch norm, and few enough for any network on a laptop."""


def check_ray_address(address: str) -> None:
    """Refuse a Ray cluster that does not answer; Flower would wait for it for ever.

    Raises:
        SimulationError: ``address`` (host:port) cannot be connected to.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not address or address in ("auto", "local"):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise SimulationError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): unset RAY_ADDRESS to "
            f"start a private one, or start that cluster"
        ) from None


def check_resources(
    client_cpus: int, client_gpus: float, total_cpus: int | None, total_gpus: int | None
) -> None:
    """Refuse clients of which not even one fits; a Ray cluster (RAY_ADDRESS) knows for itself.

    Raises:
        ComponentError: naming what a client wants and what there is.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    cpus = total_cpus if total_cpus is not None else os.cpu_count() or 1
    gpus = total_gpus if total_gpus is not None else torch.cuda.device_count()
    for wanted, there, what in ((client_cpus, cpus, "cores"), (client_gpus, gpus, "GPUs")):
        if wanted > there:
            raise ComponentError(f"each client wants {wanted} {what}, there are {there}; ask less")


def prepare(
    settings: RunSettings, clients: int, folder: RunFolder, *, own_data: bool = False
) -> None:
    """Find every component that the run will need, fetch its data, and rehearse a client.

    Clients with ``own_data`` are rehearsed on all of the run's, which nobody shares out.

    Raises:
        ComponentError: one does not exist, has wrong settings, or does not go with the others.
        DatasetError: the data cannot be fetched, or not be shared among ``clients``.
        RecordingError: ``folder`` holds a recording to resume that was made otherwise.
    """
    strategy = flower_strategy(settings.strategy, {})
    with_differential_privacy(strategy, settings.dp_strategy)
    refuse_proximal_term(getattr(strategy, "proximal_mu", 0.0))
    partition = cast(Partition, create("partitions", settings.partition))
    model = cast(Model, create("models", settings.model))
    create_all("defenses", settings.client_defense)
    dataset = create("datasets", settings.dataset)
    if hasattr(dataset, "prepare"):
        dataset.prepare()
    labels = dataset.labels("train")
    own = torch.arange(len(labels))
    if not own_data:
        own = partition.indices(labels, 0, clients, seed=settings.seed)
    if settings.client_property_schedule or settings.client_active_clients:
        check_property_roles(settings, model, dataset, partition, clients)
    rehearse(settings, model, dataset, own)
    if settings.resume and folder.manifest.exists():
        check_same(open_store(folder.recording), manifest_of(settings, dataset.task()))


def check_property_roles(
    settings: RunSettings, model: Model, dataset: Dataset, partition: Partition, clients: int
) -> None:
    """Refuse victims and active adversaries that have not the samples, or the network, they need.

    Logs how closely property and main task go together over all clients' samples.

    Raises:
        ComponentError: naming the client, what it has and what it needs.
        DatasetError: the property has one value only, or is the main task itself.
    """
    active, victims = settings.client_active_clients, settings.client_victims
    if active and settings.client_property_schedule and active + victims > clients:
        raise ComponentError(
            f"client-victims {victims} and client-active-clients {active} are more than the "
            f"{clients} clients; nobody is both"
        )
    if active:
        two_heads(model.build(dataset.task(), seed=settings.seed), dataset.task(), seed=0)
    name, labels, values = settings.client_property, [], []
    for client in range(clients):
        own = partition.indices(dataset.labels("train"), client, clients, seed=settings.seed)
        samples = without_inputs(dataset, own)
        labels.append(samples.labels)
        values.append(values_of(samples, name))
        try:
            refuse_role(samples, settings, client, clients)
        except ComponentError as error:
            raise ComponentError(f"client {client}: {error}") from None
    relation = check_property(name, torch.cat(labels), torch.cat(values))
    tell_relation(name, relation, " over the clients' samples")


def without_inputs(dataset: Dataset, own: Tensor) -> Samples:
    """The training samples ``own``, with inputs ``[n, 0]`` where the dataset can do without."""
    if not isinstance(dataset, Attributed):
        return dataset.load("train", own)
    held = {name: values[own] for name, values in dataset.property_values("train").items()}
    return Samples(torch.empty(len(own), 0), dataset.labels("train")[own], held)


def refuse_role(samples: Samples, settings: RunSettings, client: int, clients: int) -> None:
    """Refuse samples with which ``client`` of ``clients`` cannot play its part in any round.

    Raises:
        ComponentError: saying what it has and what it needs.
    """
    if settings.is_active(client, clients):
        refuse_one_kind(samples, settings.client_property)
    else:
        refuse_schedule(samples, settings, client)


def rehearse(settings: RunSettings, model: Model, dataset: Dataset, own: Tensor) -> None:
    """Take one local step on a few of the samples ``own``, with the defenses, on the CPU.

    Raises:
        ComponentError: model, data, local training and defenses do not go together.
    """
    spec = settings.client_defense if settings.client_defended_share else ""
    gradient_defense, update_defenses = split_defenses(create_all("defenses", spec))
    training, draws = settings.local_training, generator(settings.seed, "rehearsal")
    try:
        next(draw_batches(len(own), training, generator=draws))
        few = dataset.load("train", own[: min(training.batch_size, REHEARSED_SAMPLES)])
        network = model.build(dataset.task(), seed=settings.seed)
        refuse_statistics(settings.dp_strategy, (name for name, _ in network.named_buffers()))
        gradient_defense = rehearsed_privacy(gradient_defense, settings, len(own))
        if isinstance(gradient_defense, Costly):
            if warning := gradient_defense.warning(network, training):
                getLogger("flwr").warning("%s", warning)
            gradient_defense = gradient_defense.rehearsal()
        sent = {name: value.clone() for name, value in network.state_dict().items()}
        returned = local_train(
            network,
            dataset.task(),
            few,
            training.model_copy(update={"epochs": 1, "batch_size": len(few)}),
            generator=draws,
            gradient_defense=gradient_defense,
            defense_generator=draws,
        ).state
        names = trained_names(network)
        defend_update(sent, returned, update_defenses, names=names, generator=draws)
    except (ValueError, RuntimeError) as error:
        defended = f" with {spec}" if spec else ""
        raise ComponentError(
            f"no client can train {settings.model} on {settings.dataset}{defended}: {error}"
        ) from error

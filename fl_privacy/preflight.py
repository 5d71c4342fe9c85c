"""What is checked and fetched before a simulation starts: refusal comes before work."""

from __future__ import annotations

import os
import socket

import torch

from fl_privacy.component import ComponentError, create, create_all
from fl_privacy.recording_opening import check_same
from fl_privacy.recording_store import open_store
from fl_privacy.run_folder import RunFolder
from fl_privacy.run_manifest import manifest_of
from fl_privacy.settings import RunSettings
from fl_privacy.superlink import SimulationError
from strategies.flower import flower_strategy


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


def prepare(settings: RunSettings, folder: RunFolder) -> None:
    """Find every component that the run will need, and fetch its data, before it starts.

    Raises:
        ComponentError: one does not exist or has wrong settings.
        DatasetError: the data cannot be fetched.
        RecordingError: ``folder`` holds a recording to resume that was made otherwise.
    """
    create("models", settings.model)
    create("partitions", settings.partition)
    create_all("defenses", settings.client_defense)
    flower_strategy(settings.strategy, {})
    dataset = create("datasets", settings.dataset)
    if hasattr(dataset, "prepare"):
        dataset.prepare()
    if settings.resume and folder.manifest.exists():
        check_same(open_store(folder.recording), manifest_of(settings, dataset.task()))

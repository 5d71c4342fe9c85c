"""What a recording of this app says of itself; the clients' own settings are not in it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version

from fl_privacy.code_digest import code_digest
from fl_privacy.component import VERSION, create, spec_of
from fl_privacy.recording import Manifest
from fl_privacy.settings import RunSettings
from fl_privacy.types import Task

_PACKAGES = ("flwr", "torch", "torchvision", "numpy")


def manifest_of(settings: RunSettings, task: Task) -> Manifest:
    """The manifest of a run with ``settings`` on a dataset of ``task``."""
    model, dataset = create("models", settings.model), create("datasets", settings.dataset)
    packages = {name: version(name) for name in _PACKAGES}
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=spec_of("models", model),
        dataset=spec_of("datasets", dataset),
        task=task,
        local_training=settings.local_training,
        run_config=settings.public(),
        versions={"fl-privacy": VERSION, "python": platform.python_version(), **packages},
        code_digest=code_digest(),
    )

"""What a simulation refuses before it starts Flower."""

from pathlib import Path

import pytest

from fl_privacy.preflight import prepare
from fl_privacy.recording import RecordingError, RecordingWriter
from fl_privacy.run_folder import RunFolder
from fl_privacy.run_manifest import manifest_of
from fl_privacy.settings import RunSettings, Scalar, parse_settings

SMALL: dict[str, Scalar] = {"dataset": "digits", "model": "mlp(hidden=(4,))", "partition": "iid"}


def settings(**changed: Scalar) -> RunSettings:
    return parse_settings({**SMALL, **{k.replace("_", "-"): v for k, v in changed.items()}})


def test_a_recording_of_another_strategy_is_not_resumed(tmp_path: Path) -> None:
    from fl_privacy.datasets.digits import Digits

    folder, krum = RunFolder(tmp_path), settings(strategy="krum")
    RecordingWriter.open(folder.recording, manifest_of(krum, Digits().task())).close()
    prepare(krum.model_copy(update={"resume": True}), folder)
    with pytest.raises(RecordingError, match="holds strategy krum, the run to resume has fedavg"):
        prepare(settings(resume=True), folder)

"""What a simulation refuses before it starts Flower."""

from pathlib import Path

import pytest
import torch

from fl_privacy.component import ComponentError
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.digits import Digits
from fl_privacy.preflight import prepare
from fl_privacy.recording import RecordingError, RecordingWriter
from fl_privacy.run_folder import RunFolder
from fl_privacy.run_manifest import manifest_of
from fl_privacy.settings import RunSettings, Scalar, parse_settings

SMALL: dict[str, Scalar] = {"dataset": "digits", "model": "mlp(hidden=(4,))", "partition": "iid"}


def settings(**changed: Scalar) -> RunSettings:
    return parse_settings({**SMALL, **{k.replace("_", "-"): v for k, v in changed.items()}})


def test_a_recording_of_another_strategy_is_not_resumed(tmp_path: Path) -> None:
    folder, krum = RunFolder(tmp_path), settings(strategy="krum")
    RecordingWriter.open(folder.recording, manifest_of(krum, Digits().task())).close()
    prepare(krum.model_copy(update={"resume": True}), 2, folder)
    with pytest.raises(RecordingError, match="holds strategy krum, the run to resume has fedavg"):
        prepare(settings(resume=True), 2, folder)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"partition": "iid"}, DatasetError, "5000 clients cannot share 1437 samples"),
        ({"strategy": "fedprox(proximal_mu=0.1)"}, ComponentError, "proximal_mu=0"),
    ],
)
def test_what_no_client_can_do_is_refused(
    changed: dict[str, Scalar], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        prepare(settings(**changed), 5000, RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "convnet64"}, r"train convnet64 on digits: expected images .* such as mlp"),
        (
            {
                "dataset": "fashion-mini",
                "model": "convnet64",
                "client_defense": "per_sample_clipping(max_norm=1)",
            },
            r"with per_sample_clipping.*: per-sample gradients do not exist .* batch-norm to eval",
        ),
        (
            {"algorithm": "fedavg", "batch_size": 1000, "drop_last": True},
            "no batch to train on: 719 samples, batch_size 1000",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    changed: dict[str, Scalar], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ComponentError, match=message):
        prepare(settings(**changed), 2, RunFolder(tmp_path))


def test_a_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    told = settings(client_defense="per_sample_clipping(max_norm=1) + gaussian_noise(scale=0.1)")
    prepare(told, 2, RunFolder(tmp_path / "run"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not (tmp_path / "run").exists()

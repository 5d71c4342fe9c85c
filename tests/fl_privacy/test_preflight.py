"""What a simulation refuses before it starts Flower."""

from logging import getLogger
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.defenses import soteria
from clients.defenses.soteria_layer import Features
from clients.defenses.soteria_scores import exact_norms
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


@pytest.mark.parametrize(
    ("changed", "warned"),
    [({}, True), ({"batch_norm": "eval"}, False), ({"batch_size": 1}, False)],
)
def test_exact_soteria_is_rehearsed_on_one_feature_and_its_price_is_told(
    changed: dict[str, Scalar],
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scored: list[int] = []

    def counting(features: Features, inputs: Tensor, **settings: Any) -> Tensor:
        found = exact_norms(features, inputs, **settings)
        scored.append(found.shape[1])
        return found

    monkeypatch.setattr(soteria, "exact_norms", counting)
    monkeypatch.setattr(getLogger("flwr"), "propagate", True)
    told = {"model": "convnet64", "dataset": "fashion-mini", "batch_size": 2, **changed}
    prepare(settings(**told, client_defense="soteria"), 2, RunFolder(tmp_path / "run"))
    assert scored == [1]
    said = "exact scores take 2 times as long" in caplog.text and "scores='sketch'" in caplog.text
    assert said == warned
    with pytest.raises(ComponentError, match="got 'fc9'; layers that do: classifier"):
        lost = settings(**told, client_defense="soteria(layer='fc9')")
        prepare(lost, 2, RunFolder(tmp_path / "run"))

"""The script behind the quality tables: failures count, simulated clients are the real ones."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from adversaries.nearest_image import NearestImage
from fl_privacy.component import create
from fl_privacy.recording import Recording
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault

SCRIPT = Path(__file__).parent / "benchmarks" / "quality_inversion.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_inversion", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOUND = {"status": "completed", "psnr": 30.0, "identifiability": 1.0, "label_accuracy": 1.0}
FAILED = {"status": "failed", "psnr": None, "identifiability": None, "label_accuracy": None}


@pytest.mark.parametrize(
    ("found", "failed", "share"), [(1, 3, "25 ["), (4, 0, "100 ["), (0, 4, "0 [")]
)
def test_failed_targets_have_no_share(
    script: ModuleType, found: int, failed: int, share: str
) -> None:
    rows = [{**FOUND, "seconds": 1.0}] * found + [{**FAILED, "seconds": None}] * failed
    cells = [cell.strip() for cell in script.line("some", rows).strip("|").split("|")]
    row = dict(zip(script.COLUMNS, cells, strict=True))
    for column in ("> 25 dB, %", "identified, %", "labels, %"):
        assert row[column].startswith(share)
    assert (row["n"], row["failed"]) == (str(found), str(failed))
    assert row["PSNR dB [95 %]"].startswith("30.0" if found else "nan")


def test_the_nearest_image_is_sought_among_all(script: ModuleType) -> None:
    attack = create("adversaries", script.GUESSES[-1])
    assert isinstance(attack, NearestImage)
    assert attack.candidates >= script.AUXILIARY


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_clients_are_simulated_if_each_label_is_at_its_image(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    random = np.random.default_rng(0)
    x, y = random.random((12, 1, 6, 6)), np.arange(12) % 3
    np.savez(tmp_path / "own.npz", x_train=x, x_test=x, y_train=y, y_test=y)
    dataset = f"npz(path={str(tmp_path / 'own.npz')!r})"
    options = argparse.Namespace(
        model="mlp(hidden=(8,))",
        targets=2,
        images=6,
        algorithm="fedavg",
        epochs=2,
        batch_size=2,
        lr=0.3,
        order=order,
        batch_norm="train",
        seed=0,
    )
    model = create("models", options.model).build(create("datasets", dataset).task(), seed=0)
    script.record(tmp_path, dataset, model, options)
    vault = TruthVault(tmp_path / "truth")
    for observation in ThreatModel().observe(Recording(tmp_path / "recording")):
        held = vault.samples(observation.exchanges)
        at_its_image = script.mismatch(observation, held.inputs, held.labels)
        elsewhere = script.mismatch(observation, held.inputs, held.labels.roll(2))
        assert elsewhere > 0.05
        assert (at_its_image < 1e-5) == (order == "sequential")
    script.report_mismatch(tmp_path, ThreatModel())
    told = capsys.readouterr().out
    assert f"({order} training)" in told
    assert "inferred labels as an attack gets them, in ascending order (medians, n = 2)" in told

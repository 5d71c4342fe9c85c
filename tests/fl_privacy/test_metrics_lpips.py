"""LPIPS against its equation, with stand-in weights in a torch hub folder; and without any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional as F

from fl_privacy.analysis import prepare
from fl_privacy.metrics.lpips import LPIPS, lpips_each, network, weights_file
from fl_privacy.metrics.preparing import MetricError, prepared_metrics
from fl_privacy.plan import Plan
from fl_privacy.testing import check_metric, toy_model
from fl_privacy.testing.toys import TASK
from fl_privacy.types import Outcome, Reconstruction, Samples

CONVOLUTIONS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
"""Place in AlexNet's features -> stride and padding; the second and third follow a pooling."""


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Tensor]]:
    """Random features of AlexNet's shapes, saved where torchvision looks for the real ones."""
    from torchvision.models import alexnet

    with torch.device("meta"):
        shapes = {n: t.shape for n, t in alexnet().state_dict().items()}
    draw = torch.Generator().manual_seed(1)
    state = {
        n: torch.randn(shape, generator=draw) * (2 / shape[1:].numel()) ** 0.5
        if n.startswith("features")
        else torch.zeros(1).expand(shape)
        for n, shape in shapes.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        weights_file().parent.mkdir(parents=True)
        torch.save(state, weights_file())
        yield state


def by_hand(state: Mapping[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1: weighted squared distance of unit-length features, ``[k]``."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    linear = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, y = ((2 * pixels - 1 - shift) / scale for pixels in (a, b))
    total = torch.zeros(len(a))
    for k, (place, (stride, padding)) in enumerate(CONVOLUTIONS.items()):
        weight, bias = (state[f"features.{place}.{n}"] for n in ("weight", "bias"))
        if place in (3, 6):
            x, y = F.max_pool2d(x, 3, 2), F.max_pool2d(y, 3, 2)
        x = F.conv2d(x, weight, bias, stride, padding).relu()
        y = F.conv2d(y, weight, bias, stride, padding).relu()
        apart = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
        total += (apart * linear[f"lin{k}.model.1.weight"]).sum(1).mean((1, 2))
    return total


def test_it_is_the_equation_of_the_paper(weights: Mapping[str, Tensor]) -> None:
    a, b = images(3, 3, 40, 47), images(3, 3, 40, 47, seed=1)
    got = lpips_each(a.double(), b.double())
    assert got.dtype == torch.float64
    assert torch.allclose(got.float(), by_hand(weights, a, b), rtol=1e-3)
    assert float(got.min()) > 0.01
    assert torch.equal(lpips_each(a, a), torch.zeros(3, dtype=torch.float64))


@pytest.mark.usefixtures("weights")
def test_grey_is_color_with_equal_channels_and_small_images_are_enlarged() -> None:
    a, b = images(2, 1, 33, 33), images(2, 1, 33, 33, seed=1)
    assert torch.equal(lpips_each(a, b), lpips_each(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    a, b = images(2, 3, 16, 24), images(2, 3, 16, 24, seed=1)
    large = [F.interpolate(x, scale_factor=2.0, mode="bilinear") for x in (a, b)]
    assert torch.allclose(lpips_each(a, b), lpips_each(*large))
    assert bool(lpips_each(images(1, 1, 31, 31), images(1, 1, 31, 31, seed=1)).isfinite())
    assert bool(lpips_each(images(1, 1, 30, 30), images(1, 1, 30, 30, seed=1)).isfinite())


@pytest.mark.usefixtures("weights")
def test_a_pair_has_the_same_value_in_any_company() -> None:
    a, b = images(70, 1, 28, 28), images(70, 1, 28, 28, seed=1)
    together = lpips_each(a, b)
    alone = torch.cat([lpips_each(a[i : i + 1], b[i : i + 1]) for i in (0, 63, 64, 69)])
    assert torch.allclose(together[[0, 63, 64, 69]], alone, rtol=1e-4)


@pytest.mark.usefixtures("weights")
def test_it_keeps_the_contract_and_leaves_the_random_state_alone() -> None:
    network.cache_clear()  # so that the network is built under watch
    check_metric(LPIPS())


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights in the folder, no network to fetch them by."""

    def refuse(*args: object, **context: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"


def test_without_weights_an_analysis_is_refused_before_it_starts(offline: Path, run: Path) -> None:
    with pytest.raises(MetricError) as refused:
        prepare(run, Plan(adversary="analytic", metrics=("psnr", "lpips")), model=toy_model)
    said = str(refused.value)
    assert f"expected {offline}, which is missing" in said
    assert "no route to host" in said
    assert 'Run once where there is a network: python -c "from torchvision.models' in said
    assert not (run / "results").exists()


@pytest.mark.usefixtures("offline")
def test_signals_have_no_lpips_and_need_no_weights() -> None:
    task = TASK.model_copy(update={"input_shape": (1, 100)})
    metric = prepared_metrics(["lpips"], "", task)["lpips"]
    signal = images(2, 1, 100)
    labels = torch.zeros(2, dtype=torch.int64)
    made = Reconstruction("aa", signal, labels, Outcome("completed"))
    assert math.isnan(float(metric.score([made], [Samples(signal, labels)])[0]))


class Trap:
    """Pickled; touches a file when it is read as an object."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("trap", [True, False])
def test_a_file_that_holds_no_weights_is_refused_and_never_run(offline: Path, trap: bool) -> None:
    offline.parent.mkdir(parents=True)
    sprung = offline.parent / "sprung"
    if trap:
        torch.save({"features.0.weight": Trap(sprung)}, offline)
    else:
        offline.write_bytes(b"<html>not found</html>")
    with pytest.raises(MetricError, match="which cannot be read, remove it"):
        prepared_metrics(["lpips"], "", TASK)
    assert not sprung.exists()

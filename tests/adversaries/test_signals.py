"""The same attacks on 1-D signals, and on pictures of odd sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fl_privacy.component import create
from fl_privacy.protocols import Adversary
from fl_privacy.types import LocalTraining, Observation, Reconstruction, Task

Observe = Callable[..., list[Observation]]
CPU = torch.device("cpu")
TRAINING = LocalTraining(lr=0.1)


def task_of(*shape: int) -> Task:
    return Task(input_shape=shape, classes=4, mean=(0.45,) * shape[0], std=(0.3,) * shape[0])


SIGNAL = task_of(2, 24)


def traces(count: int) -> Tensor:
    """Smooth curves in [0, 1], another one in each channel."""
    t = torch.linspace(0, 1, 24)
    rows = [0.5 + 0.4 * torch.sin(6 * t * (1 + k / 3) + k) for k in range(2 * count)]
    return torch.stack(rows).view(count, 2, 24)


def convolutional() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(2, 8, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(192, 4)
        )
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def dense() -> nn.Module:
    model: nn.Module = create("models", "mlp(hidden=(64,))").build(SIGNAL, seed=0)
    return model


def found(spec: str, observations: list[Observation]) -> list[Reconstruction]:
    attack = create("adversaries", spec)
    assert isinstance(attack, Adversary)
    results = list(attack.attack(observations, seed=0, device=CPU))
    assert all(isinstance(r, Reconstruction) for r in results), results
    return [r for r in results if isinstance(r, Reconstruction)]


@pytest.mark.parametrize("model", [convolutional, dense])
@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("gradient_similarity(iterations=400, tv=1e-4)", 2e-3),
        ("dlg(iterations=30, restarts=2)", 1e-4),
        ("idlg(iterations=25)", 1e-4),
    ],
)
def test_signals_are_recovered(
    observe: Observe, model: Callable[[], nn.Module], spec: str, error: float
) -> None:
    truth = traces(2)
    results = found(spec, observe(model, SIGNAL, truth, training=TRAINING))
    for i, result in enumerate(results):
        assert result.inputs.shape == (1, 2, 24)
        assert result.labels.tolist() == [i]
        guess = (truth[i] - truth[i].mean()).square().mean()
        assert (result.inputs[0] - truth[i]).square().mean() < error < 0.1 * guess


def test_a_dense_layer_gives_a_signal_away_exactly(observe: Observe) -> None:
    truth = traces(3)
    results = found("analytic", observe(dense, SIGNAL, truth, training=TRAINING))
    assert (
        max(float((r.inputs[0] - x).abs().max()) for r, x in zip(results, truth, strict=True))
        < 1e-4
    )


def test_total_variation_smooths_a_signal(observe: Observe) -> None:
    (observation,) = observe(convolutional, SIGNAL, traces(1), training=TRAINING)

    def roughness(tv: float) -> float:
        spec = f"gradient_similarity(iterations=60, tv={tv})"
        return float(found(spec, [observation])[0].inputs.diff(dim=-1).abs().mean())

    assert roughness(0.5) < 0.5 * roughness(0.0)


@pytest.mark.parametrize("name", ["das-shallow", "das-fashionnet", "das-convnet"])
def test_networks_for_signals_can_be_attacked(observe: Observe, name: str) -> None:
    def build() -> nn.Module:
        model: nn.Module = create("models", name).build(SIGNAL, seed=0)
        return model.eval()

    observations = observe(build, SIGNAL, traces(1), training=TRAINING)
    (result,) = found("gradient_similarity(iterations=3)", observations)
    assert result.inputs.shape == (1, 2, 24)


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 7, 5), (1, 1, 8), (3, 11, 2), (1, 3, 3)])
def test_pictures_of_any_size_grey_and_color(observe: Observe, shape: tuple[int, ...]) -> None:
    channels, height, width = shape
    task = task_of(*shape)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(channels, 12, 3, padding=1),
                nn.Sigmoid(),
                nn.Flatten(),
                nn.Linear(12 * height * width, 4),
            )
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        return model

    truth = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    (result,) = found("idlg(iterations=20)", observe(build, task, truth, training=TRAINING))
    assert result.inputs.shape == (1, *shape)
    assert (result.inputs - truth).square().mean() < 1e-4


@pytest.mark.parametrize("images", [2, 3])
def test_dlg_finds_the_labels_of_a_batch_jointly(observe: Observe, images: int) -> None:
    """Without being told or inferring them: soft labels and inputs are searched together."""
    truth = traces(images)
    training = LocalTraining(lr=0.1, batch_size=images)
    (observation,) = observe(dense, SIGNAL, truth, images=images, training=training)
    told = replace(observation, labels=torch.full((images,), 3))  # wrong, and of no consequence
    (result,) = found("dlg(iterations=40, restarts=2)", [told])
    assert sorted(result.labels.tolist()) == list(range(images))

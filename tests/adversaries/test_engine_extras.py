"""Batch-norm statistics, networks that cannot be differentiated, and memory that runs out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from adversaries.batch_statistics import deviation, observed_statistics
from adversaries.differentiability import check_differentiable
from adversaries.gradient_matching import GradientMatching
from adversaries.gradient_similarity import GradientSimilarity
from adversaries.local_steps import Client, Sent, skeleton
from adversaries.matching import Chunk
from adversaries.parts import PartError, select
from adversaries.targets import Unattackable
from fl_privacy.testing import toy_model, toy_observations
from fl_privacy.testing.toys import TASK
from fl_privacy.types import Exchange, Failure, LocalTraining, Observation, Reconstruction

CPU = torch.device("cpu")


def normed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 4),
        )


def one_step(inputs: Tensor, training: LocalTraining) -> Observation:
    """A client's real step on a network with batch norm."""
    model = normed().train()
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=training.lr)
    loss = F.cross_entropy(model(inputs), torch.arange(len(inputs)) % 4)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    after = {n: t.detach().clone() for n, t in model.state_dict().items()}
    names = [n for n, _ in model.named_parameters()]
    buffers = ("1.running_mean", "1.running_var")
    exchange = Exchange(
        attempt=1,
        round=1,
        node="1",
        num_examples=len(inputs),
        digest="",
        global_digest="",
        parameters={n: before[n] for n in names},
        buffers={n: before[n] for n in buffers},
        update={n: after[n] - before[n] for n in names},
        returned_buffers={n: after[n] for n in buffers},
    )
    template, _ = toy_observations(1)
    return replace(
        template[0], exchanges=(exchange,), model=normed, local_training=training, task=TASK
    )


def test_batch_norm_gives_its_statistics_away_exactly() -> None:
    inputs = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    training = LocalTraining(lr=0.1, batch_size=3)
    observation = one_step(inputs, training)
    model = skeleton(normed(), training)
    statistics = observed_statistics(observation, model)
    features = normed()[0](inputs)  # type: ignore[index]
    torch.testing.assert_close(
        statistics["1.mean"].float(), features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        statistics["1.variance"].float(), features.var((0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    sent = Sent(observation.exchanges[0].parameters, {})
    client = Client(model, training, (3,), (sent,))
    seen = {n: t.float() for n, t in statistics.items()}
    assert deviation(client, seen, inputs) < 1e-8
    assert deviation(client, seen, inputs + 1) > 1e-3


def test_the_statistics_prior_runs_and_is_refused_where_there_is_none() -> None:
    inputs = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    training = LocalTraining(lr=0.1, batch_size=2)
    attack = GradientSimilarity(iterations=3, batch_norm=0.1)
    (result,) = attack.attack([one_step(inputs, training)], seed=0, device=CPU)
    assert isinstance(result, Reconstruction)
    kept = training.model_copy(update={"batch_norm": "eval"})
    for observation, reason in (
        (replace(one_step(inputs, training), local_training=kept), "eval mode"),
        (toy_observations(1)[0][0], "needs a network with batch norm"),
    ):
        (failure,) = attack.attack([observation], seed=0, device=CPU)
        assert reason in getattr(failure, "reason", "")


class _Once(Function):
    """An operation without a second derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None: ...

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return slope * 2


class _Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Once.apply(x)
        return result


class _Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(36))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.flatten(1).sum(0))
        return x


@pytest.mark.parametrize("layer", [_Custom(), _Adds()])
def test_the_layer_that_breaks_the_derivative_is_named(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(36, 4)).eval()
    with pytest.raises(Unattackable, match=rf"1 \({type(layer).__name__}\)"):
        check_differentiable(model, TASK)


@pytest.mark.parametrize(
    "layer", [nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.GELU(), nn.InstanceNorm2d(1), nn.Dropout()]
)
def test_common_layers_can_be_attacked(layer: nn.Module) -> None:
    features = 9 if isinstance(layer, nn.MaxPool2d) else 36
    model = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1), layer, nn.Flatten(), nn.Linear(features, 4)
    )
    check_differentiable(skeleton(model, LocalTraining()), TASK)


def test_out_of_memory_halves_the_batch_and_one_target_is_the_last_resort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observations, _ = toy_observations(5)
    attack = GradientSimilarity(iterations=3, width=5)
    whole = list(attack.attack(observations, seed=0, device=CPU))
    solve, widths = GradientMatching.solve, []

    def limited(limit: int) -> object:
        def run(self: GradientMatching, chunk: object, width: int, **rest: object) -> object:
            widths.append(width)
            if width > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return solve(self, chunk, width, **rest)  # type: ignore[arg-type]

        return run

    monkeypatch.setattr(GradientMatching, "solve", limited(2))
    halved = list(attack.attack(observations, seed=0, device=CPU))
    assert widths == [5, 2, 2, 2]
    assert [r.key for r in halved] == [r.key for r in whole]
    for result in halved:
        assert isinstance(result, Reconstruction)
        assert "in batches of 2, as the memory did not suffice for 5" in result.outcome.message
    monkeypatch.setattr(GradientMatching, "solve", limited(0))
    reasons = [getattr(r, "reason", "") for r in attack.attack(observations, seed=0, device=CPU)]
    assert all("does not fit into memory" in reason for reason in reasons)


def test_a_width_that_did_not_fit_is_not_tried_again_and_only_what_does_not_fit_fails() -> None:
    observations, _ = toy_observations(8)
    tried: list[int] = []

    class Small(GradientSimilarity):
        def solve(self, chunk: Chunk, width: int, **rest: object) -> list[Reconstruction]:
            tried.append(width)
            if width > 2 or any(t.key == observations[1].key for t in chunk.targets):
                raise MemoryError
            return super().solve(chunk, width, **rest)  # type: ignore[arg-type]

    results = list(Small(iterations=1, width=4).attack(observations, seed=0, device=CPU))
    assert [isinstance(r, Failure) for r in results] == [i == 1 for i in range(8)]
    assert tried == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", ["1.weight", "1.bias", "3.weight", "3.bias"]),
        ("dense", ["1.weight", "1.bias", "3.weight", "3.bias"]),
        ("3", ["3.weight", "3.bias"]),
        ("3.bias,1.weight", ["1.weight", "3.bias"]),
    ],
)
def test_parts_are_chosen_by_kind_and_by_name(layers: str, expected: Sequence[str]) -> None:
    model = toy_model()
    assert select(model, layers, [n for n, _ in model.named_parameters()]) == expected


@pytest.mark.parametrize("layers", ["convolutions", "conv9", "1.weight,nope"])
def test_parts_that_do_not_exist_are_refused_with_those_that_do(layers: str) -> None:
    model = toy_model()
    with pytest.raises(PartError, match=r"1\.weight, 1\.bias, 3\.weight"):
        select(model, layers, [n for n, _ in model.named_parameters()])


def test_only_entries_that_are_not_zero_are_matched() -> None:
    (observation,), _ = toy_observations(1)
    (exchange,) = observation.exchanges
    sparse = {n: u * (u.abs() > u.abs().median()) for n, u in exchange.update.items()}
    target = replace(observation, exchanges=(replace(exchange, update=sparse),))

    def final(nonzero: bool) -> float:
        attack = GradientSimilarity(iterations=150, tv=0.0, nonzero=nonzero)
        (result,) = attack.attack([target], seed=0, device=CPU)
        assert isinstance(result, Reconstruction)
        return result.loss

    assert final(nonzero=True) < 0.5 * final(nonzero=False)

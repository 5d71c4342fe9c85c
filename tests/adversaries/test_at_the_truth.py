"""At the truth every attack has nothing left to do, and closed forms give the truth.

In float64, on clients written with `torch.optim`, for every installed attack: whatever is
added to the table is tested here without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from adversaries.gradient_matching import GradientMatching
from adversaries.local_steps import skeleton, steps
from adversaries.matching import Chunk, make_batch
from adversaries.targets import Unattackable
from fl_privacy.component import create, find, installed
from fl_privacy.layers import trained_names
from fl_privacy.protocols import Adversary
from fl_privacy.types import Exchange, LocalTraining, Observation, Reconstruction, Task

CPU = torch.device("cpu")
MATCHING = sorted(
    name
    for name in installed("adversaries")
    if issubclass(find("adversaries", name), GradientMatching)
)


def task_of(*shape: int) -> Task:
    return Task(input_shape=shape, classes=4, mean=(0.3,) * shape[0], std=(0.4,) * shape[0])


IMAGE, SIGNAL = task_of(2, 6, 5), task_of(2, 20)


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 12), nn.Tanh(), nn.Linear(12, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(180, 4)
    )


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(90, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


def frozen() -> nn.Module:
    model = normed()
    model.get_submodule("0").requires_grad_(False)
    return model


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(30, 4)
    )


STEP = LocalTraining(lr=0.3, weight_decay=0.01, order="sequential")
EPOCHS = LocalTraining(
    algorithm="fedavg", lr=0.1, epochs=2, batch_size=2, momentum=0.5, order="sequential"
)
KEPT = LocalTraining(lr=0.3, batch_size=3, batch_norm="eval")


@dataclass(frozen=True)
class Case:
    """Who trained how on what: ``members`` images for each client of an aggregate."""

    network: Callable[[], nn.Module]
    training: LocalTraining = STEP
    members: tuple[int, ...] = (1,)
    rounds: int = 1
    task: Task = IMAGE
    settings: dict[str, object] = field(default_factory=dict)


CASES = {
    "dense": Case(dense),
    "convolutional": Case(convolutional),
    "only entries that are not zero": Case(normed, KEPT, settings={"nonzero": True}),
    "signal": Case(signals, task=SIGNAL),
    "linked rounds": Case(dense, rounds=3),
    "batch norm, eval": Case(normed, KEPT),
    "batch": Case(convolutional, members=(3,)),
    "batch norm, batch": Case(normed, members=(4,)),
    "batch norm, prior": Case(normed, settings={"batch_norm": 0.5}),
    "batch norm, prior, batch": Case(normed, members=(4,), settings={"batch_norm": 0.5}),
    "batch norm, eval, batch": Case(normed, KEPT, members=(3,)),
    "aggregate": Case(dense, members=(1, 2)),
    "fedavg": Case(dense, EPOCHS, members=(4,)),
    "fedavg, convolutional": Case(convolutional, EPOCHS, members=(3,)),
    "frozen layer": Case(frozen, members=(2,)),
    "fedavg, frozen layer": Case(frozen, EPOCHS, members=(3,)),
    "fedavg, batch norm": Case(normed, EPOCHS, members=(4,)),
    "fedavg, aggregate, linked rounds": Case(dense, EPOCHS, members=(3, 2), rounds=2),
}
PARTS = {  # of a gradient, so not for attacks that match something else
    "dense part": Case(convolutional, settings={"layers": "dense"}),
    "convolutions": Case(convolutional, settings={"layers": "convolutions"}),
    "named part": Case(dense, members=(2,), settings={"layers": "1.weight, 3.bias"}),
}


def network_of(case: Case) -> nn.Module:
    """The same weights at each call, with batch-norm statistics that are not the default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.network().double()
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.4)
            if isinstance(layer, _BatchNorm):
                nn.init.uniform_(layer.get_buffer("running_mean"), -0.2, 0.2)
                nn.init.uniform_(layer.get_buffer("running_var"), 0.5, 1.5)
    return model


def client(case: Case, sent: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What one client returns, by `torch.optim.SGD` in float64."""
    model, training = network_of(case).train(), case.training
    model.load_state_dict(sent)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.train(training.batch_norm == "train")
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    for chosen in steps(training, len(y)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def observed(case: Case) -> tuple[Observation, Tensor]:
    """The observation of a case, its labels granted, and the true pixels."""
    images = sum(case.members)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(images, *case.task.input_shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(case.task.classes, (images,), generator=generator)
    x, exchanges = case.task.normalize(inputs), []
    state = dict(network_of(case).state_dict())
    names = trained_names(network_of(case))
    buffers = [n for n, t in state.items() if n not in names and t.is_floating_point()]
    for number in range(1, case.rounds + 1):
        parts = zip(
            torch.split(x, list(case.members)), torch.split(labels, list(case.members)), strict=True
        )
        returned = [client(case, state, *part) for part in parts]
        update = {
            n: torch.stack(
                [
                    m / images * (r[n] - state[n])
                    for m, r in zip(case.members, returned, strict=True)
                ]
            ).sum(0)
            for n in names
        }
        exchanges.append(
            Exchange(
                attempt=1,
                round=number,
                node="1",
                num_examples=images,
                digest=str(number),
                global_digest=str(number),
                parameters={n: state[n] for n in names},
                buffers={n: state[n] for n in buffers},
                update=update,
                returned_buffers={n: returned[0][n] for n in buffers},
                members=case.members if len(case.members) > 1 else (),
            )
        )
        state = {**state, **{n: state[n] + u for n, u in update.items()}}
    observation = Observation(
        key="target",
        exchanges=tuple(exchanges),
        model=lambda: network_of(case).float(),
        task=case.task,
        labels=labels,
        local_training=case.training,
    )
    return observation, inputs


Slopes = Callable[[Tensor, Tensor], tuple[tuple[Tensor, Tensor], Tensor]]


def slopes_of(attack: GradientMatching, observation: Observation) -> Slopes:
    """Inputs and soft labels of one lane -> the objective's gradient by both, and its value."""
    training = observation.local_training
    assert training is not None
    model = skeleton(observation.model(), training)
    chunk = Chunk(model, observation, (attack.prepare(observation, model),), 0)
    unrolled = attack.local_steps == "unroll"
    batch = make_batch(
        chunk, lanes=1, restarts=1, device=CPU, dtype=torch.float64, unrolled=unrolled
    )
    seen = (attack.scale(batch.observed), batch.statistics)
    slope = grad_and_value(partial(attack.objective, batch), argnums=(0, 1))
    return lambda x, y: vmap(slope)(x[None], y[None], seen)


def attack_of(name: str, case: Case) -> GradientMatching:
    attack = create("adversaries", name, {"tv": 0.0, **case.settings})
    assert isinstance(attack, GradientMatching)
    return attack


def refusal(name: str, case: Case) -> str:
    """What an attack that does not treat a case says; nothing for those that do."""
    if name == "representation" and sum(case.members) > 1:
        return "expected one image"
    return ""


def approximates(name: str, case: Case) -> bool:
    """Whether an attack takes several local steps for one, which they are not."""
    taken = max(case.training.steps(n) for n in case.members)
    return name == "update_over_lr" and taken > 1


def soft(observation: Observation) -> Tensor:
    assert observation.labels is not None
    return F.one_hot(observation.labels, observation.task.classes).double()


@pytest.mark.parametrize(
    ("name", "label"),
    [(name, label) for name in MATCHING for label in CASES]
    + [(name, label) for name in MATCHING for label in PARTS if name != "representation"],
)
def test_nothing_is_left_to_match_at_the_truth(name: str, label: str) -> None:
    case = {**CASES, **PARTS}[label]
    observation, inputs = observed(case)
    if message := refusal(name, case):
        with pytest.raises(Unattackable, match=message):
            slopes_of(attack_of(name, case), observation)
        return
    slopes = slopes_of(attack_of(name, case), observation)
    truth, labels = case.task.normalize(inputs), soft(observation)
    away = truth + 0.5 * torch.randn(
        truth.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    (by_input, by_label), value = slopes(truth, labels)
    (far, _), far_value = slopes(away, labels)
    if approximates(name, case):
        assert value > 1e-6
        assert by_input.norm() > 1e-6 * far.norm()
        return
    assert far_value > 1e-4
    assert far.norm() > 1e-6
    assert value.abs() < 1e-10 * far_value
    assert by_input.norm() < 1e-8 * far.norm()
    assert by_label.norm() < 1e-8 * max(1.0, float(far.norm()))


@pytest.mark.parametrize("name", MATCHING)
def test_the_priors_alone_are_what_is_left(name: str) -> None:
    """With total variation the objective at the truth is the truth's, times its weight."""
    case = CASES["dense"]
    observation, inputs = observed(case)
    attack = attack_of(name, case).model_copy(update={"tv": 0.5})
    truth = case.task.normalize(inputs)
    _, value = slopes_of(attack, observation)(truth, soft(observation))
    expected = truth.diff(dim=-1).abs().mean() + truth.diff(dim=-2).abs().mean()
    torch.testing.assert_close(value[0], 0.5 * expected)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("analytic", "dense"),
        ("analytic", "linked rounds"),
        ("rgap", "dense"),
        ("rgap", "convolutional"),
    ],
)
def test_closed_forms_answer_with_the_truth(name: str, label: str) -> None:
    observation, inputs = observed(CASES[label])
    attack = create("adversaries", name)
    assert isinstance(attack, Adversary)
    (result,) = attack.attack([observation], seed=0, device=CPU)
    assert isinstance(result, Reconstruction), result
    assert (result.inputs - inputs).abs().max() < 1e-5
    assert result.outcome.status == "completed"

"""The simulated client against the real one, step by step."""

import uuid
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.dlg import DLG
from adversaries.gradient_similarity import GradientSimilarity
from adversaries.idlg import IDLG
from adversaries.local_steps import Client, Sent, skeleton, steps
from adversaries.targets import prepare
from fl_privacy import component
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.testing.toys import TASK, toy_model, toy_samples
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import Failure, LocalTraining, Observation, Reconstruction, Samples

CPU = torch.device("cpu")


def trained(model: nn.Module, samples: Samples, training: LocalTraining) -> dict[str, Tensor]:
    """A client written with torch.optim, in float64, taking the samples in their order."""
    model = model.double()
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    for chosen in steps(training, len(samples)):
        optimizer.zero_grad()
        outputs = model(TASK.normalize(samples.inputs[chosen].double()))
        loss = F.cross_entropy(outputs, samples.labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_the_unrolled_update_is_the_real_clients(
    epochs: int, batch_size: int, momentum: float, decay: float
) -> None:
    training = LocalTraining(
        algorithm="fedavg",
        lr=0.05,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=decay,
        order="sequential",
    )
    samples, model = toy_samples(6), toy_model().double()
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    after = trained(toy_model(), samples, training)
    client = Client(skeleton(model, training), training, (6,), (Sent(before, {}),))
    (simulated,) = client.simulate(TASK.normalize(samples.inputs.double()), samples.labels)
    for name, update in simulated.items():
        expected = (before[name] - after[name]) / training.lr
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-9)


def test_an_unknown_order_leaves_an_error_that_is_small_but_there() -> None:
    training = LocalTraining(algorithm="fedavg", lr=0.05, epochs=2, batch_size=2)
    samples, model = toy_samples(6), toy_model().double()
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    client = Client(skeleton(model, training), training, (6,), (Sent(before, {}),))
    held = TASK.normalize(samples.inputs.double())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    (known,), (shuffled,) = (
        client.simulate(held[o], samples.labels[o]) for o in (torch.arange(6), order)
    )
    error = torch.stack([(known[n] - shuffled[n]).norm() for n in known]).norm()
    size = torch.stack([known[n].norm() for n in known]).norm()
    assert 1e-6 < error / size < 0.2


def test_drop_last_leaves_images_out() -> None:
    training = LocalTraining(algorithm="fedavg", batch_size=2, drop_last=True, epochs=2)
    assert list(steps(training, 5)) == [slice(0, 2), slice(2, 4)] * 2
    assert training.images(5) == 4
    assert training.steps(5) == 4


def test_an_aggregate_is_the_weighted_mean_of_its_members() -> None:
    training = LocalTraining(algorithm="fedavg", lr=0.05, epochs=2, batch_size=2)
    samples, model = toy_samples(5), toy_model().double()
    sent = (Sent(dict(model.state_dict()), {}),)
    held = TASK.normalize(samples.inputs.double())

    def update(chosen: slice, members: tuple[int, ...]) -> dict[str, Tensor]:
        client = Client(skeleton(model, training), training, members, sent)
        (found,) = client.simulate(held[chosen], samples.labels[chosen])
        return dict(found)

    whole = update(slice(0, 5), (2, 3))
    first, second = update(slice(0, 2), (2,)), update(slice(2, 5), (3,))
    for name in whole:
        torch.testing.assert_close(whole[name], (2 * first[name] + 3 * second[name]) / 5)


def observe(
    training: LocalTraining, samples: Samples, *, rounds: int = 1, unit: str = "update"
) -> list[Observation]:
    """One client, whose weights go round and round, recorded and observed."""
    location = f"memory://test-{uuid.uuid4().hex}"
    manifest = Manifest(created="", task=TASK, local_training=training)
    model = toy_model()
    with RecordingWriter.open(location, manifest) as writer:
        for round in range(1, rounds + 1):
            layout = Layout.of(model)
            _, sent = writer.put_global(
                {n: t.float().numpy() for n, t in model.state_dict().items()}, layout
            )
            after = trained(model, samples, training)
            arrays = {n: t.float().numpy() for n, t in after.items()}
            writer.append(
                round=round,
                node="1",
                arrays=arrays,
                num_examples=len(samples),
                global_digest=sent,
                layout=layout,
            )
    return ThreatModel(unit=unit).observe(Recording(location), model=toy_model)


def error_of(attack: object, observations: list[Observation], truth: Tensor) -> float:
    (result,) = attack.attack(observations, seed=0, device=CPU)  # type: ignore[attr-defined]
    assert isinstance(result, Reconstruction), result
    every = (result.inputs[:, None] - truth[None]).flatten(2).square().mean(2)
    return float(every.min(0).values.mean())


@pytest.mark.parametrize("held", [(0, 1), (1, 0), (2, 0, 1)])
def test_fedavg_updates_are_inverted_by_unrolling_and_worse_without(held: tuple[int, ...]) -> None:
    """Whatever the order of the labels in the local batches, one restart finds it."""
    training = LocalTraining(algorithm="fedavg", lr=0.1, epochs=4, batch_size=1, order="sequential")
    samples = Samples(toy_samples(len(held)).inputs, torch.tensor(held))
    observations = observe(training, samples)
    attack = IDLG(iterations=20, restarts=12)
    ignored = attack.model_copy(update={"local_steps": "ignore"})
    assert error_of(attack, observations, samples.inputs) < 1e-3
    assert error_of(ignored, observations, samples.inputs) > 1e-2


@pytest.mark.parametrize("unrolled", [True, False])
def test_labels_of_several_steps_allow_for_momentum_and_decay(unrolled: bool) -> None:
    training = LocalTraining(
        algorithm="fedavg", lr=0.01, epochs=3, batch_size=2, momentum=0.9, weight_decay=0.1
    )
    samples = Samples(toy_samples(6).inputs, torch.tensor([3, 1, 3, 3, 1, 1]))
    (observation,) = observe(training, samples)
    model = skeleton(toy_model(), training)
    target = prepare(observation, model, unrolled=unrolled)
    assert target.labels.tolist() == [1, 1, 1, 3, 3, 3]


def test_labels_that_are_granted_stay_in_place_only_if_the_order_is_known() -> None:
    samples = Samples(toy_samples(4).inputs, torch.tensor([2, 0, 3, 1]))
    for order, known in (("sequential", True), ("shuffled", False)):
        training = LocalTraining(algorithm="fedavg", epochs=2, batch_size=2, order=order)
        (observation,) = observe(training, samples)
        model = skeleton(toy_model(), training)
        assert not prepare(observation, model).placed
        assert prepare(replace(observation, labels=samples.labels), model).placed == known


def test_linked_rounds_of_one_client_are_attacked_together() -> None:
    training = LocalTraining(algorithm="fedavg", lr=0.1, batch_size=2, order="sequential")
    samples = toy_samples(2)
    observations = observe(training, samples, rounds=3, unit="client")
    model = skeleton(toy_model(), training)
    assert len(observations) == 1
    assert len(prepare(observations[0], model).observed) == 3
    assert error_of(IDLG(iterations=20), observations, samples.inputs) < 1e-3


def test_linked_rounds_that_drew_other_batches_are_refused() -> None:
    training = LocalTraining(algorithm="fedsgd", lr=0.1, batch_size=2)
    observations = observe(training, toy_samples(2), rounds=2, unit="client")
    (result,) = GradientSimilarity(iterations=2).attack(observations, seed=0, device=CPU)
    assert isinstance(result, Failure)
    assert "another random batch" in result.reason


def test_dlg_finds_inputs_and_labels_together() -> None:
    samples = toy_samples(1)
    observations = observe(LocalTraining(lr=0.1), samples)
    (result,) = DLG(iterations=25).attack(observations, seed=1, device=CPU)
    assert isinstance(result, Reconstruction)
    assert result.labels.tolist() == samples.labels.tolist()
    assert (result.inputs - samples.inputs).square().mean() < 1e-4


@pytest.mark.parametrize("layers", ["dense", "1", "1.weight, 3.bias"])
def test_a_part_of_the_gradient_can_do(layers: str) -> None:
    samples = toy_samples(1)
    observations = observe(LocalTraining(lr=0.1), samples)
    attack = component.create("adversaries", "idlg", {"layers": layers, "iterations": 20})
    assert error_of(attack, observations, samples.inputs) < 1e-3

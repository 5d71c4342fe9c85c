"""Every attack against theory: zero loss at the truth, exactness, independence."""

import uuid
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from adversaries.analytic import Analytic
from adversaries.baseline import Baseline
from adversaries.dlg import DLG
from adversaries.gradient_matching import Found, Problem
from adversaries.gradient_similarity import GradientSimilarity
from adversaries.idlg import IDLG
from adversaries.l2_tv import L2TV
from adversaries.local_steps import skeleton
from adversaries.matching import Batch, Chunk, box, chunks, lane_draws, make_batch
from adversaries.planning import MAX_WIDTH, lane_count, plan_width
from adversaries.targets import prepare
from adversaries.update_over_lr import UpdateOverLR
from fl_privacy import component
from fl_privacy.processes import MEMORY_SHARES
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.testing import check_adversary, toy_observations, toy_samples
from fl_privacy.testing.toys import TASK, TRAINING
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import Failure, LocalTraining, Observation, Reconstruction, Task

CPU = torch.device("cpu")
PAIRS = LocalTraining(lr=0.1, batch_size=2)


def recorded(
    spec: str, task: Task, inputs: Tensor, labels: Tensor, images: int, training: LocalTraining
) -> list[Observation]:
    """Observations of clients that took one SGD step on ``images`` inputs each."""
    model = component.create("models", spec).build(task, seed=0).train(True)
    location = f"memory://test-{uuid.uuid4().hex}"
    layout = Layout.of(model)
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    manifest = Manifest(created="", model=spec, task=task, local_training=training)
    with RecordingWriter.open(location, manifest) as writer:
        _, sent = writer.put_global({n: t.numpy() for n, t in state.items()}, layout)
        for i in range(0, len(inputs), images):
            model.load_state_dict(state)
            optimizer = torch.optim.SGD(
                model.parameters(), lr=training.lr, weight_decay=training.weight_decay
            )
            optimizer.zero_grad()
            x = task.normalize(inputs[i : i + images])
            loss = F.cross_entropy(model(x), labels[i : i + images])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            writer.append(
                round=1,
                node=str(i),
                arrays={n: t.detach().numpy() for n, t in model.state_dict().items()},
                num_examples=images,
                global_digest=sent,
                layout=layout,
            )
    return ThreatModel().observe(Recording(location))


def batch_of(observations: list[Observation]) -> tuple[GradientSimilarity, Chunk]:
    attack = GradientSimilarity(tv=0.0)
    training = observations[0].local_training
    assert training is not None
    model = skeleton(observations[0].model(), training)
    targets = tuple(prepare(o, model) for o in observations)
    return attack, Chunk(model, observations[0], targets, 0)


def slopes(
    attack: GradientSimilarity, batch: Batch, inputs: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient and value of the attack's objective on every lane."""
    seen = (attack.scale(batch.observed), batch.statistics)
    objective = partial(attack.objective, batch)
    gradient, losses = vmap(grad_and_value(objective))(inputs, labels, seen)
    return gradient, losses


def grey(size: int, channels: int = 1) -> Task:
    return Task(
        input_shape=(channels, size, size),
        classes=10,
        mean=(0.3,) * channels,
        std=(0.35,) * channels,
    )


@pytest.mark.parametrize(
    ("spec", "task", "images"),
    [
        ("lenet-zhu", grey(28), 1),
        ("lenet-zhu", grey(28), 3),
        ("convnet64", grey(12, 3), 2),
        ("mlp", grey(8), 1),
    ],
)
def test_the_objective_and_its_gradient_vanish_at_the_truth(
    spec: str, task: Task, images: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2 * images, *task.input_shape, generator=generator)
    labels = torch.randint(10, (2 * images,), generator=generator)
    training = LocalTraining(lr=0.5, weight_decay=0.01, batch_size=images)
    observations = recorded(spec, task, inputs, labels, images, training)
    attack, chunk = batch_of(observations)
    batch = make_batch(chunk, lanes=2, restarts=1, device=CPU, dtype=torch.float64)
    truth = task.normalize(inputs).view(2, images, *task.input_shape)
    true_labels = labels.view(2, images)

    truth = truth.double()
    slope, loss = slopes(attack, batch, truth, true_labels)
    away = 0.5 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    far, _ = slopes(attack, batch, truth + away, true_labels)
    assert loss.abs().max() < 2e-6  # float32 updates keep about six digits of a gradient
    assert slope.norm() < 0.02 * far.norm()


def test_simulated_gradient_is_that_of_the_client() -> None:
    observations, truths = toy_observations()
    _, chunk = batch_of(observations)
    batch = make_batch(chunk, lanes=3, restarts=1, device=CPU)
    inputs = torch.stack([TASK.normalize(t.inputs) for t in truths])
    (simulated,) = vmap(batch.client.simulate)(inputs, batch.labels)
    for name, observed in batch.observed[0].items():
        torch.testing.assert_close(simulated[name], observed, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "adversary",
    [
        Baseline(),
        Baseline(guess="mean"),
        Baseline(guess="constant"),
        Analytic(),
        GradientSimilarity(iterations=7, width=4),
        GradientSimilarity(iterations=7, width=2, restarts=3, signed=False, boxed=False),
        L2TV(iterations=5),
        DLG(iterations=2, inner=5),
        IDLG(iterations=2, inner=5, restarts=2),
        UpdateOverLR(iterations=5),
    ],
    ids=str,
)
def test_conformance(adversary: object) -> None:
    check_adversary(adversary)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "images", "signed"),
    [(4, 1, True), (6, 1, False), (7, 2, False), (12, 2, True)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_result_is_byte_identical_whatever_its_mates_on_lenet(
    width: int, images: int, signed: bool, threads: int
) -> None:
    task = grey(28)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(6 * images, *task.input_shape, generator=generator)
    labels = torch.arange(6 * images) % 10
    training = LocalTraining(lr=0.1, batch_size=images)
    observations = recorded("lenet-zhu", task, inputs, labels, images, training)
    attack = GradientSimilarity(iterations=20, width=width, signed=signed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def run(order: list[int]) -> dict[str, Tensor]:
        results = attack.attack([observations[i] for i in order], seed=3, device=CPU)
        return {r.key: r.inputs for r in results if isinstance(r, Reconstruction)}

    try:
        together = run([0, 1, 2, 3, 4, 5])
        for order in ([5, 3, 1, 0, 2, 4], [2], [4, 2]):
            for key, pixels in run(order).items():
                assert torch.equal(pixels, together[key])
    finally:
        torch.set_num_threads(before)


def test_across_widths_draws_are_identical_and_the_first_step_agrees() -> None:
    observations, _ = toy_observations(4)
    attack, chunk = batch_of(observations)
    firsts = {}
    for width in (4, 7):
        lanes = lane_count(width, 2, CPU)
        batch = make_batch(chunk, lanes=lanes, restarts=2, device=CPU)
        shape = (1, *TASK.input_shape)
        inputs = lane_draws(chunk, shape, "initial inputs", lanes=lanes, restarts=2, seed=0)
        slope, loss = slopes(attack, batch, inputs, batch.labels)
        firsts[width] = (inputs[:8], slope[:8], loss[:8])
    assert torch.equal(firsts[4][0], firsts[7][0])
    torch.testing.assert_close(firsts[4][1], firsts[7][1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(firsts[4][2], firsts[7][2], rtol=1e-5, atol=1e-7)


def test_of_several_restarts_the_smallest_objective_is_kept() -> None:
    observations, _ = toy_observations(2)
    one, many = (
        {
            r.key: r
            for r in GradientSimilarity(iterations=30, restarts=k, width=2).attack(
                observations, seed=0, device=CPU
            )
        }
        for k in (1, 4)
    )
    for key, result in many.items():
        first = one[key]
        assert isinstance(result, Reconstruction)
        assert isinstance(first, Reconstruction)
        assert result.loss <= first.loss + 1e-6


def test_gradient_similarity_recovers_a_small_picture() -> None:
    task = grey(8)
    ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    observations = recorded("mlp(hidden=(64,))", task, ramp, torch.tensor([3]), 1, TRAINING)
    (result,) = GradientSimilarity(iterations=400, tv=0.0).attack(observations, seed=0, device=CPU)
    assert isinstance(result, Reconstruction)
    assert result.labels.tolist() == [3]
    assert (result.inputs - ramp).square().mean() < 1e-3


def test_analytic_gives_the_input_exactly() -> None:
    task = grey(8)
    inputs = torch.rand(5, *task.input_shape, generator=torch.Generator().manual_seed(2))
    training = LocalTraining(lr=0.5, weight_decay=0.1)
    observations = recorded("mlp", task, inputs, torch.arange(5), 1, training)
    for i, result in enumerate(Analytic().attack(observations, seed=0, device=CPU)):
        assert isinstance(result, Reconstruction)
        torch.testing.assert_close(result.inputs, inputs[i : i + 1], atol=1e-4, rtol=0)
        assert result.labels.tolist() == [i]


def reasons(adversary: object, observations: list[Observation]) -> list[str]:
    results = adversary.attack(observations, seed=0, device=CPU)  # type: ignore[attr-defined]
    return [r.reason if isinstance(r, Failure) else "" for r in results]


def test_analytic_names_the_layer_that_forbids_it() -> None:
    task = grey(12)
    inputs = torch.rand(2, *task.input_shape)
    convolutional = recorded("lenet-zhu", task, inputs, torch.arange(2), 1, TRAINING)
    assert "conv1 (Conv2d)" in reasons(Analytic(), convolutional)[0]
    batch = recorded("mlp", task, inputs, torch.arange(2), 2, PAIRS)
    assert "holds 2 images" in reasons(Analytic(), batch)[0]


def test_updates_that_are_no_gradient_fail_with_the_reason_and_spare_the_others() -> None:
    observations, _ = toy_observations(3)
    adam = LocalTraining(optimizer="adam", lr=0.1)
    (exchange,) = observations[1].exchanges
    broken = replace(exchange, update={n: u * torch.nan for n, u in exchange.update.items()})
    cases = [
        replace(observations[0], local_training=adam),
        replace(observations[1], exchanges=(broken,)),
        replace(observations[2], exchanges=observations[2].exchanges * 2),
        replace(observations[2], exchanges=(replace(exchange, num_examples=None),)),
        observations[2],
    ]
    found = reasons(GradientSimilarity(iterations=2), cases)
    assert "'adam': expected 'sgd'" in found[0]
    assert "not finite, first in 1.weight" in found[1]
    assert "another random batch" in found[2]
    assert "number of examples" in found[3]
    assert found[4] == ""


def test_a_diverged_target_says_so_and_stays_in_the_pixel_range() -> None:
    observations, _ = toy_observations(1)
    attack, chunk = batch_of(observations)
    batch = make_batch(chunk, lanes=1, restarts=1, device=CPU)
    nowhere = torch.full((1, 1, *TASK.input_shape), torch.nan)
    for loss in (torch.nan, torch.inf):
        found = Found(nowhere, batch.labels, torch.tensor([loss]))
        (result,) = attack.select(chunk, batch, found)
        assert result.outcome.status == "diverged"
        assert "smaller steps" in result.outcome.message
        assert 0 <= result.inputs.min() <= result.inputs.max() <= 1


def test_baseline_answers_with_the_mean_picture_and_never_reads_the_update() -> None:
    observations, _ = toy_observations(2)
    auxiliary = toy_samples(10, seed=5)
    blind = [
        replace(o, auxiliary=auxiliary, exchanges=(replace(o.exchanges[0], update={}),))
        for o in observations
    ]
    for result in Baseline().attack(blind, seed=0, device=CPU):
        assert isinstance(result, Reconstruction)
        torch.testing.assert_close(result.inputs[0], auxiliary.inputs.mean(0))
    (constant, _) = Baseline().attack(observations, seed=0, device=CPU)
    assert isinstance(constant, Reconstruction)
    torch.testing.assert_close(constant.inputs, torch.full((1, 1, 6, 6), 0.4))


def test_withheld_layers_do_not_matter() -> None:
    observations, _ = toy_observations(2)
    hidden = [replace(o, withheld=("1.weight", "1.bias")) for o in observations]

    def spoiled(observation: Observation) -> Observation:
        (exchange,) = observation.exchanges
        update = {n: u * 50 if n.startswith("1.") else u for n, u in exchange.update.items()}
        return replace(observation, exchanges=(replace(exchange, update=update),))

    def pixels(targets: list[Observation]) -> list[Tensor]:
        results = GradientSimilarity(iterations=5).attack(targets, seed=0, device=CPU)
        return [r.inputs for r in results if isinstance(r, Reconstruction)]

    plain, garbage = pixels(hidden), pixels([spoiled(o) for o in hidden])
    assert len(plain) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, garbage, strict=True))
    assert not torch.equal(pixels([spoiled(observations[0])])[0], pixels(observations[:1])[0])


def test_every_target_and_restart_starts_elsewhere() -> None:
    observations, _ = toy_observations(3)
    _, chunk = batch_of(observations)
    draws = lane_draws(chunk, (4,), "initial inputs", lanes=6, restarts=2, seed=0)
    assert len({tuple(d.tolist()) for d in draws}) == 6
    other = lane_draws(chunk, (4,), "initial inputs", lanes=6, restarts=2, seed=1)
    assert not torch.equal(draws, other)


@pytest.mark.parametrize("signed", [True, False])
def test_the_optimizer_is_adam_with_the_published_schedule(signed: bool) -> None:
    observations, _ = toy_observations(1)
    attack, chunk = batch_of(observations)
    attack = attack.model_copy(update={"iterations": 40, "signed": signed, "tv": 0.0})
    batch = make_batch(chunk, lanes=1, restarts=1, device=CPU, dtype=torch.float64)
    start = torch.randn(1, 1, *TASK.input_shape, dtype=torch.float64)
    seen = (attack.scale(batch.observed), batch.statistics)
    problem = Problem(batch, seen, partial(attack.objective, batch), lambda *_: start)
    found = attack.optimize(problem, start.clone(), lambda *_: None)

    x = start.clone().requires_grad_(True)
    low, high = box(TASK, start)
    adam = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [15, 25, 35], gamma=0.1)
    for _ in range(40):
        slope, _ = slopes(attack, batch, x.detach(), batch.labels)
        x.grad = slope.sign() if signed else slope
        adam.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.minimum(torch.maximum(x, low), high))
    torch.testing.assert_close(found.inputs, x.detach(), rtol=1e-9, atol=1e-9)


def test_targets_share_a_batch_only_with_equal_parameters_and_sizes() -> None:
    observations, _ = toy_observations(5)
    (exchange,) = observations[3].exchanges
    other_round = replace(observations[3], exchanges=(replace(exchange, global_digest="b"),))
    bigger = replace(observations[4], exchanges=(replace(exchange, num_examples=2),))
    mixed = [observations[0], other_round, observations[1], bigger, observations[2]]
    assert list(chunks(mixed, 2)) == [[0, 2], [1], [3], [4]]


def test_a_batch_holds_so_many_images_whatever_a_target_claims() -> None:
    observations, _ = toy_observations(4)
    (exchange,) = observations[0].exchanges
    pairs = [replace(o, exchanges=(replace(exchange, num_examples=2),)) for o in observations]
    huge = replace(observations[0], exchanges=(replace(exchange, num_examples=10**9),))
    assert list(chunks([*pairs, huge], 5)) == [[0, 1], [2, 3], [4]]
    assert plan_width([*pairs, huge], restarts=1, device=CPU) == 8


def test_planned_width_is_bounded_by_the_work() -> None:
    observations, _ = toy_observations(5)
    assert plan_width(observations, restarts=1, device=CPU) == 5
    assert plan_width(observations[:1], restarts=4, device=CPU) == 1
    (exchange,) = observations[0].exchanges
    elsewhere = replace(observations[0], exchanges=(replace(exchange, global_digest="b"),))
    assert plan_width([*observations, elsewhere], restarts=1, device=CPU) == 5


def test_on_cuda_memory_and_work_alone_bound_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    observations = toy_observations(1)[0] * (3 * MAX_WIDTH)
    free = [2**40]
    monkeypatch.setattr("adversaries.planning.free_memory", lambda _device: free[0])

    def width(device: str, restarts: int = 1) -> int:
        return plan_width(observations, restarts=restarts, device=torch.device(device))

    assert (width("cpu"), width("cuda")) == (MAX_WIDTH, 3 * MAX_WIDTH)
    free[0] = 2**23  # room for fewer than there are
    assert MAX_WIDTH < width("cuda") < 3 * MAX_WIDTH
    assert width("cuda", restarts=4) == width("cuda") // 4
    alone = width("cuda")
    monkeypatch.setenv(MEMORY_SHARES, "4")  # as processes of a sweep are told
    assert width("cuda") == alone // 4


def test_progress_counts_target_iterations_and_ends_at_the_total() -> None:
    observations, _ = toy_observations(5)
    seen: list[tuple[int, int]] = []
    attack = GradientSimilarity(iterations=4, width=2)
    list(
        attack.attack(
            observations,
            seed=0,
            device=CPU,
            progress=lambda done, total, *, loss=None: seen.append((done, total)),
        )
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (20, 20)

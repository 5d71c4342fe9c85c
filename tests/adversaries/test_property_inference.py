"""The passive property inference adversary: what it draws, simulates, finds, and refuses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from adversaries import property_snapshot
from adversaries.auxiliary_batches import (
    Pool,
    draw_batches,
    has_property,
    meaningless_pool,
    pool_of,
    simulated_features,
    with_property,
)
from adversaries.gradient_features import Family, features
from adversaries.local_steps import skeleton
from adversaries.property_inference import PropertyInference, fewest_images
from adversaries.property_snapshot import Clients, Memory, window_of
from clients.training import local_train
from fl_privacy import attack_command
from fl_privacy.analysis import prepare
from fl_privacy.component import create
from fl_privacy.datasets.properties import PropertyError
from fl_privacy.metrics.auc import auc_interval
from fl_privacy.plan import Plan
from fl_privacy.property_rows import scored
from fl_privacy.recording import Layout, Manifest, Recording, RecordingWriter
from fl_privacy.report.page import write_report
from fl_privacy.seeding import generator
from fl_privacy.testing import check_adversary, toy_observations
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthVault
from fl_privacy.types import (
    Failure,
    GlobalModel,
    LocalTraining,
    Observation,
    PropertyScores,
    Samples,
    Task,
)

TASK = Task(input_shape=(1, 6, 6), classes=2, mean=(0.4,), std=(0.2,))
MODEL = "mlp(hidden=(12,))"
BATCH = 8
CPU = torch.device("cpu")
QUICK = "classifier='logistic', batches=48, window=4"
FedSGD = LocalTraining(lr=0.1, batch_size=BATCH)
FedAvg = LocalTraining(algorithm="fedavg", lr=0.05, batch_size=4, epochs=2, order="sequential")


def people(count: int, seed: int) -> Samples:
    """Pictures whose label is in the top row and whose property, ``hat``, in the bottom row."""
    draw = generator(seed, "people")
    inputs = torch.rand(count, *TASK.input_shape, generator=draw) * 0.5
    labels = torch.randint(2, (count,), generator=draw)
    hat = torch.randint(2, (count,), generator=draw)
    inputs[:, 0, 0] += 0.3 * labels[:, None]
    inputs[:, 0, 5] += 0.5 * hat[:, None]
    return Samples(inputs, labels, {"hat": hat, "shoes": torch.zeros(count).long()})


def taken(samples: Samples, chosen: Tensor) -> Samples:
    held = {name: values[chosen] for name, values in samples.properties.items()}
    return Samples(samples.inputs[chosen], samples.labels[chosen], held)


def record(
    run: Path, *, rounds: int, clients: int = 1, training: LocalTraining = FedSGD
) -> ThreatModel:
    """An audited run: client 0 sends a batch of hats every third round, the others never."""
    model = create("models", MODEL).build(TASK, seed=0)
    samples, draw, layout = people(300, 1), generator("victim"), Layout.of(model)
    hat, vault = samples.properties["hat"], TruthVault(run / "truth")
    manifest = Manifest(created="", model=MODEL, task=TASK, local_training=training)
    with RecordingWriter.open(run / "recording", manifest) as writer:
        for number in range(1, rounds + 1):
            sent = {n: t.detach().numpy().copy() for n, t in model.state_dict().items()}
            _, shared = writer.put_global(sent, layout)
            returned = []
            for node in range(clients):
                having = torch.nonzero(hat == int(node == 0 and number % 3 == 0)).flatten()
                chosen = having[torch.randperm(len(having), generator=draw)[:BATCH]]
                batch = taken(samples, chosen)
                model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in sent.items()})
                local_train(model, TASK, batch, training, generator=draw)
                returned.append({n: t.clone() for n, t in model.state_dict().items()})
                writer.append(
                    round=number,
                    node=str(node),
                    arrays={n: t.numpy() for n, t in returned[-1].items()},
                    num_examples=BATCH,
                    global_digest=shared,
                    layout=layout,
                )
                where = {"attempt": 1, "round": number, "node": str(node)}
                vault.write(**where, step=0, samples=batch, indices=chosen)  # type: ignore[arg-type]
                vault.write_defense(**where, spec="", stats={})  # type: ignore[arg-type]
            writer.end_round(number)
            model.load_state_dict(
                {n: torch.stack([r[n] for r in returned]).mean(0) for n in returned[0]}
            )
    return ThreatModel(auxiliary=saved(run / "aux.npz", people(200, 2)))


def saved(path: Path, samples: Samples) -> str:
    """A data set of these samples, by the name under which it is found."""
    arrays = {"x": samples.inputs, "y": samples.labels, **samples.properties}
    held = {f"{n}_{s}": a.numpy() for n, a in arrays.items() for s in ("train", "test")}
    np.savez(path, **held)  # type: ignore[arg-type]
    named = tuple(f"{name}_{{split}}" for name in samples.properties)
    return f"npz(path={str(path)!r}, properties={named})"


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ThreatModel]:
    """A run of 24 rounds of one client."""
    run = tmp_path_factory.mktemp("audited")
    return run, record(run, rounds=24)


def observed(audited: tuple[Path, ThreatModel], **changes: object) -> list[Observation]:
    run, granted = audited
    return granted.model_copy(update=changes).observe(Recording(run / "recording"))


def quick(**changes: object) -> PropertyInference:
    made: PropertyInference = create(
        "adversaries", f"property_inference(property='hat', {QUICK})", changes
    )
    return made


def scores(
    adversary: PropertyInference, observations: Sequence[Observation], seed: int = 0
) -> list[PropertyScores]:
    results = list(adversary.attack(observations, seed=seed, device=CPU))
    assert all(isinstance(result, PropertyScores) for result in results), results
    return [result for result in results if isinstance(result, PropertyScores)]


# What is drawn


def test_batches_hold_the_property_in_turn_and_the_others_do_not() -> None:
    samples = people(100, 0)
    hat, shares = samples.properties["hat"], (1.0, 0.4, 0.6, 0.8)
    drawn = draw_batches(pool_of(samples, "hat"), (10,), shares, 16, generator(0))
    having = hat[drawn].sum(1)
    assert has_property(16).tolist() == [True, False] * 8
    assert sorted(having[0::2].tolist()) == [4, 4, 6, 6, 8, 8, 10, 10]
    assert having[1::2].tolist() == [0] * 8
    assert all(len(set(row)) == 10 for row in drawn.tolist())


@pytest.mark.parametrize("together", [2, 8])
def test_what_is_drawn_does_not_depend_on_how_many_are_simulated_at_once(
    audited: tuple[Path, ThreatModel], monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    drawn: list[Tensor] = []

    def seen(*given: object) -> dict[str, Tensor]:
        drawn.append(given[3])  # type: ignore[arg-type]
        return simulated_features(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(property_snapshot, "simulated_features", seen)
    samples, shares = people(200, 2), PropertyInference().shares
    (observation,) = observed(audited)[:1]
    scores(quick(window=1, batches=16, together=together), [observation])
    having = samples.properties["hat"][torch.cat(drawn)].sum(1)[0::2].tolist()
    expected = [with_property(BATCH, share) for share in shares]
    turns = [having[i : i + 4] for i in (0, 4)]
    assert turns[0] == turns[1]
    assert turns[0] in [expected[i:] + expected[:i] for i in range(4)]
    reference = generator(0, *observation_key(observation), "auxiliary batches")
    first = int(torch.randint(4, (), generator=reference))
    whole = draw_batches(pool_of(samples, "hat"), (BATCH,), shares, 16, reference, first=first)
    assert torch.equal(torch.cat(drawn), whole)


def observation_key(observation: Observation) -> tuple[int | str, ...]:
    return observation.exchanges[0].global_digest, BATCH


def test_one_client_of_several_has_the_property_and_the_others_add_batches_without() -> None:
    samples = people(200, 0)
    hat, counts = samples.properties["hat"], (6, 4, 10)
    drawn = draw_batches(pool_of(samples, "hat"), counts, (0.5,), 60, generator(0))
    by_client = torch.stack([hat[part].sum(1) for part in torch.split(drawn, list(counts), 1)], 1)
    assert not by_client[1::2].any()
    assert ((by_client[0::2] > 0).sum(1) == 1).all()
    assert by_client[0::2].amax(0).tolist() == [3, 2, 5]  # each of them in turn, half its batch
    assert with_property(1, 0.4) == 1


@pytest.mark.parametrize("training", [FedSGD, FedAvg], ids=["fedsgd", "fedavg"])
def test_a_simulated_update_is_what_the_client_would_send(training: LocalTraining) -> None:
    """Of an aggregate of two clients, after as many local steps as they take."""
    model, samples = create("models", MODEL).build(TASK, seed=0), people(40, 3)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    counts, drawn = (8, 6), torch.arange(28).view(2, 14)
    pool, layers = pool_of(samples, "hat"), ("dense1", "classifier")
    simulated = Clients(
        skeleton(model, training), training, counts, TASK, samples, pool, (1.0,), layers, CPU
    )
    sent = GlobalModel(1, 1, "", state, {})
    found = simulated_features(simulated.sent(sent), TASK, samples, drawn, layers)

    def update(chosen: Tensor) -> dict[str, Tensor]:
        model.load_state_dict(state)
        order = replace_order(training)
        after = local_train(
            model, TASK, taken(samples, chosen), order, generator=generator(0)
        ).state
        return {n: (state[n] - after[n]) / training.lr for n in state}

    for row, chosen in enumerate(drawn):
        first, second = (update(part) for part in torch.split(chosen, list(counts)))
        mean = {n: (8 * first[n] + 6 * second[n]) / 14 for n in first}
        expected = features({n: t[None] for n, t in mean.items()}, layers)
        for layer in layers:
            assert torch.allclose(found[layer][row], expected[layer][0], rtol=1e-3, atol=1e-5)


def replace_order(training: LocalTraining) -> LocalTraining:
    """As the simulation has it: one batch of all samples, or batches in order."""
    size = {"batch_size": 100} if training.algorithm == "fedsgd" else {}
    return training.model_copy(update={"order": "sequential", **size})


def test_the_window_ends_with_the_exchange_and_looks_back_only(
    audited: tuple[Path, ThreatModel],
) -> None:
    observation = observed(audited)[9]
    exchange = observation.exchanges[0]

    def rounds(first: int, most: int, seen: Observation = observation) -> list[int]:
        return [model.round for model in window_of(seen, exchange, first, most)]

    assert exchange.round == 10
    assert len(observation.history) == 24
    assert rounds(1, 4) == [7, 8, 9, 10]
    assert rounds(9, 4) == [9, 10]
    assert rounds(1, 100) == list(range(1, 11))
    assert rounds(1, 4, replace(observation, history=())) == [10]


# What is found


def area(results: Sequence[PropertyScores], layer: str = "") -> tuple[float, float, float]:
    """AUC with its interval; the property is there in every third round."""
    values = [float(s) for r in results for s in (r.by_layer[layer] if layer else r.scores)]
    found = auc_interval(values, [number % 3 == 0 for number in range(1, len(values) + 1)])
    return found.low, found.mean, found.high


def test_a_property_is_found_and_its_permuted_twin_is_not(
    audited: tuple[Path, ThreatModel],
) -> None:
    targets, attack = observed(audited), quick(layers="dense1")
    found, null = scores(attack, targets), scores(attack.null(), targets)
    assert {r.property for r in found} == {"hat"}
    for layer in ("", "dense1"):
        assert area(found, layer)[0] > 0.6
        low, _, high = area(null, layer)
        assert low < 0.5 < high


def looks(seed: int, stream: str) -> Samples:
    """Twelve people, 10 samples of each, who look alike; half of them have what means nothing."""
    draw = generator(seed, stream)
    whose = torch.arange(120) // 10
    seen = torch.randn(12, 15, generator=draw)[whose] + torch.randn(120, 15, generator=draw)
    has = (torch.randperm(12, generator=draw) % 2)[whose]
    return Samples(seen, torch.randint(2, (120,), generator=draw), {"hat": has}, whose)


def told_apart(seed: int, auxiliary: Samples, known: Pool) -> float:
    """AUC of a linear classifier on a victim's batches, taught anew each round."""
    victim, found, having = looks(seed, "victim"), [], []
    own = pool_of(victim, "hat")
    for number in range(16):
        draw = generator(seed, number)
        batches = draw_batches(known, (8,), (1.0,), 8, draw)
        taught = auxiliary.inputs[batches].mean(1)
        direction = taught[0::2].mean(0) - taught[1::2].mean(0)
        held = own.positives if number % 2 else own.negatives
        chosen = held[torch.randperm(len(held), generator=draw)[:8]]
        found.append(float(victim.inputs[chosen].mean(0) @ direction))
        having.append(number % 2 == 1)
    return auc_interval(found, having).mean


def test_the_null_varies_as_much_as_an_attack_on_what_means_nothing() -> None:
    """Both learn looks of people, which are the same in all rounds."""
    attacks, nulls = [], []
    for seed in range(24):
        auxiliary = looks(seed, "auxiliary")
        attacks.append(told_apart(seed, auxiliary, pool_of(auxiliary, "hat")))
        nulls.append(told_apart(seed, auxiliary, meaningless_pool(auxiliary, "hat", seed)))
    assert 0.7 < np.std(nulls) / np.std(attacks) < 1.4
    assert abs(np.mean(nulls) - 0.5) < 3 * np.std(nulls) / 24**0.5


def test_the_meaningless_property_is_one_for_all_rounds_and_of_people() -> None:
    samples = replace(people(60, 0), people=torch.arange(60) // 6)
    samples.properties["hat"].copy_(torch.arange(10).repeat_interleave(6) % 2)
    null, attack = (Memory(3, 8, 4, permuted=permuted) for permuted in (True, False))
    pool = null.pool(samples, "hat")
    assert null.pool(samples, "hat") is pool
    kinds = [set((held // 6).tolist()) for held in (pool.positives, pool.negatives)]
    assert [len(kind) for kind in kinds] == [5, 5]  # whole people, as many as before
    assert not kinds[0] & kinds[1]
    other = Memory(4, 8, 4, permuted=True).pool(samples, "hat")
    assert not torch.equal(other.positives, pool.positives)
    assert torch.equal(attack.pool(samples, "hat").positives, pool_of(samples, "hat").positives)


def test_a_property_is_found_in_updates_of_several_local_steps(tmp_path: Path) -> None:
    targets = observed((tmp_path, record(tmp_path, rounds=15, training=FedAvg)))
    assert area(scores(quick(), targets))[1] > 0.9


@pytest.mark.parametrize(("own", "rounds"), [("", 30), ("2", 15)], ids=["server", "client"])
def test_a_property_is_found_in_an_aggregate(tmp_path: Path, own: str, rounds: int) -> None:
    """Of three clients; an adversary that is one of them sees the mean of the other two."""
    granted = record(tmp_path, rounds=rounds, clients=3)
    targets = observed((tmp_path, granted), unit="aggregate", own_node=own)
    assert {o.exchanges[0].members for o in targets} == {(BATCH,) * (2 if own else 3)}
    assert area(scores(quick(batches=96, shares=(1.0,)), targets))[0] > 0.5


def test_the_aggregate_of_the_others_is_the_whole_less_the_adversarys_part(tmp_path: Path) -> None:
    granted = record(tmp_path, rounds=1, clients=3)
    (every,) = observed((tmp_path, granted), unit="aggregate")
    (others,) = observed((tmp_path, granted), unit="aggregate", own_node="1")
    assert others.own_update is not None
    for name, seen in others.exchanges[0].update.items():
        total = 3 * BATCH * every.exchanges[0].update[name] - BATCH * others.own_update[name]
        assert torch.allclose(seen, total / (2 * BATCH), atol=1e-9)


def test_a_score_depends_on_no_other_exchange(audited: tuple[Path, ThreatModel]) -> None:
    """Alone, in any order, or linked: the same bits; and the same rounds judged later."""
    targets, attack = observed(audited)[:6], quick(layers="classifier", together=6)
    every = [(float(r.scores), float(r.by_layer["classifier"])) for r in scores(attack, targets)]
    back = [
        (float(r.scores), float(r.by_layer["classifier"])) for r in scores(attack, targets[::-1])
    ]
    assert back[::-1] == every
    for i in (0, 5):
        (alone,) = scores(attack, [targets[i]])
        assert (float(alone.scores), float(alone.by_layer["classifier"])) == every[i]
    run, granted = audited
    together = granted.model_copy(update={"unit": "client"})
    (linked,) = scores(attack, together.observe(Recording(run / "recording"), rounds="2-6"))
    assert linked.scores.tolist() == [one for one, _ in every[1:]]
    assert len(set(every)) == 6
    other_seed = scores(attack, targets[:1], seed=1)
    assert float(other_seed[0].scores) != every[0][0]


def test_clients_of_several_sizes_cost_no_more_than_each_size_alone(
    audited: tuple[Path, ThreatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sized(images: int) -> list[Observation]:
        return [
            replace(o, exchanges=(replace(o.exchanges[0], num_examples=images),))
            for o in observed(audited)[:8]
        ]

    def blocks(targets: Sequence[Observation]) -> int:
        made: list[Mapping[str, Tensor]] = []
        simulate = property_snapshot.Simulated._block

        def counted(one: property_snapshot.Simulated) -> Mapping[str, Tensor]:
            made.append(made[0] if made else simulate(one))
            return made[-1]

        with monkeypatch.context() as patch:
            patch.setattr(property_snapshot.Simulated, "_block", counted)
            scores(quick(batches=12, window=2, together=2), targets)
        return len(made)

    large, small, tiny = sized(8), sized(6), sized(4)
    mixed = [one for group in zip(large, small, tiny, strict=True) for one in group]
    assert blocks(mixed) == blocks(large) + blocks(small) + blocks(tiny)


def test_one_claim_refuses_no_attack_on_the_others(audited: tuple[Path, ThreatModel]) -> None:
    """A client that claims more images than there is auxiliary data fails alone."""
    first, second, claiming = observed(audited)[:3]
    (exchange,) = claiming.exchanges
    claiming = replace(claiming, exchanges=(replace(exchange, num_examples=100_000),))
    attack = quick()
    attack.check([first, second, claiming])
    with pytest.raises(PropertyError, match="a batch takes 100000"):
        attack.check([claiming])
    results = list(attack.attack([first, claiming, second], seed=0, device=CPU))
    assert [type(result) for result in results] == [PropertyScores, Failure, PropertyScores]
    training = FedAvg.model_copy(update={"drop_last": True})
    odd = replace(first, local_training=training, auxiliary=people(24, 0))
    held = replace(exchange, num_examples=11)  # of which 8 take part
    assert fewest_images([replace(odd, exchanges=(held,))]) == 8


class Bare(nn.Linear):
    """A network that is nothing but a layer."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.flatten(1))


def test_a_layer_may_have_any_name(audited: tuple[Path, ThreatModel]) -> None:
    (observation,) = observed(audited)[:1]
    bare = replace(observation, model=lambda: Bare(36, 2))
    assert quick(layers="each").scored_by(bare) == ("auc",)  # the layer is the whole update
    named = nn.Sequential(OrderedDict({"flat": nn.Flatten(), "all": nn.Linear(36, 2)}))
    both = replace(observation, model=lambda: named)
    assert quick(layers="each").scored_by(both) == ("auc", "auc(layer='all')")
    assert quick(layers="all").scored_by(both) == ("auc",)


def test_what_is_withheld_is_not_looked_at(audited: tuple[Path, ThreatModel]) -> None:
    attack, hidden = quick(layers="each"), {"withheld": ("dense1",)}
    (seen,) = scores(attack, observed(audited, **hidden)[:1])
    assert list(seen.by_layer) == ["classifier"]
    assert float(seen.scores) == pytest.approx(float(seen.by_layer["classifier"]), abs=0.2)
    with pytest.raises(PropertyError, match="expected a threat model that leaves one"):
        attack.check(observed(audited, withheld=("dense1", "classifier")))


@pytest.mark.parametrize("family", ["forest", "logistic", "mlp"])
def test_it_keeps_the_contract(family: Family) -> None:
    known = people(8, 0)
    toys = [replace(o, auxiliary=known) for o in toy_observations(2)[0]]
    attack = PropertyInference(property="hat", classifier=family, batches=12)
    check_adversary(attack, observations=toys)


# What is refused, before any work


def changed(**properties: Tensor) -> Callable[[Samples], Samples]:
    return lambda samples: replace(samples, properties=properties)


ODD = torch.arange(200) % 2


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ("property='hut'", None, "no property 'hut'.*'hat'.*expected one of hat, shoes"),
        ("", None, "expected property='...', one of hat, shoes"),
        ("property='shoes'", None, "'shoes' .*got 0 with, 200 without and 0 unknown"),
        ("", changed(), "no property in the auxiliary data"),
        ("", changed(same=1 - people(200, 2).labels), "'same' is the main task, or its complement"),
        ("", changed(rare=(torch.arange(200) < 7).long()), "7 auxiliary samples have 'rare'.*8 "),
        ("", changed(odd=torch.where(torch.arange(200) < 193, 1, 0)), "7 auxiliary samples lack"),
        ("", changed(odd=-torch.ones(200).long()), "'odd' .*0 with, 0 without and 200 unknown"),
        ("batch_size=120", changed(odd=ODD), "expected more auxiliary data, or batch_size=100"),
        ("layers='dense1,dense9'", changed(odd=ODD), "no layer 'dense9'.*of dense1, classifier"),
        ("warm_up=24", changed(odd=ODD), "last recorded round is 24.*expected 25 rounds or more"),
    ],
)
def test_what_cannot_be_inferred_is_refused_before_any_work(
    audited: tuple[Path, ThreatModel],
    tmp_path: Path,
    settings: str,
    change: Callable[[Samples], Samples] | None,
    said: str,
) -> None:
    run, granted = audited
    if change is not None:
        granted = ThreatModel(auxiliary=saved(tmp_path / "aux.npz", change(people(200, 2))))
    before = set(run.iterdir())
    plan = Plan(adversary=f"property_inference({settings})", threat_model=granted)
    with pytest.raises(PropertyError, match=said):
        prepare(run, plan)
    assert set(run.iterdir()) == before
    targets = granted.observe(Recording(run / "recording"))[:2]
    failed = create("adversaries", plan.adversary).attack(targets, seed=0, device=CPU)
    assert all(isinstance(result, Failure) and result.reason for result in failed)


def test_rounds_of_the_warm_up_are_neither_scored_nor_learned_from(
    audited: tuple[Path, ThreatModel],
) -> None:
    (linked,) = scores(quick(warm_up=21), observed(audited, unit="client"))
    assert linked.scores.isnan().tolist() == [True] * 21 + [False] * 3
    assert linked.outcome.status == "partial"
    (last,) = scores(quick(window=3), observed(audited)[-1:])
    assert float(last.scores) == float(linked.scores[-1])  # both learn from the last three


# What a user sees


def test_the_command_line_gives_scores_results_and_a_page(
    tmp_path: Path,
) -> None:
    granted = record(tmp_path, rounds=9)
    spec = f"property_inference(property='hat', layers='dense1', {QUICK})"
    plan = Plan(adversary=spec, threat_model=granted)
    results = attack_command.attack(tmp_path, plan)
    console = Console(width=80, record=True, file=Path(tmp_path / "shown").open("w"))  # noqa: SIM115
    console.print(attack_command.scores(results))
    shown = console.export_text()
    assert "whole update" in shown and "dense1" in shown and "property permuted" in shown
    assert "3 batches with the property, 6 without" in shown
    assert "phi of hat to the main task" in shown
    relation = results[0].config.relation
    assert relation is not None
    assert (relation.name, relation.n) == ("hat", 200)
    known = people(200, 2)
    expected = np.corrcoef(known.labels, known.properties["hat"])[0, 1]
    assert relation.phi == pytest.approx(expected)
    assert attack_command.no_scores(results[0]) == ""
    values, has, _ = scored(results[0].rows(), "auc")
    assert len(values) == 9 and sum(map(bool, has)) == 3
    again = prepare(tmp_path, plan).observations
    key = {o.exchanges[0].round: o.key for o in again}
    assert {row["round"] for row in results[0].rows() if row["has_property"] == "1"} == {3, 6, 9}
    assert set(key.values()) == {row["key"] for row in results[0].rows()}
    page = write_report(tmp_path).read_text()
    assert page.count("3 batches with the property, 6 without; rounds of 1 client") == 3
    assert "phi of hat to the main task" in page
    assert "AUC" in page and "layer &#39;dense1&#39;" in page and "permuted=True" in page


def test_an_attack_without_scores_of_a_property_has_no_auc(tmp_path: Path) -> None:
    record(tmp_path, rounds=2)
    plan = Plan(adversary="update_over_lr(iterations=2)", metrics=("psnr", "auc"))
    results = attack_command.attack(tmp_path, plan)
    shown = Console(width=80, record=True, file=Path(tmp_path / "shown").open("w"))  # noqa: SIM115
    shown.print(attack_command.scores(results))
    assert "dB" in shown.export_text() and attack_command.no_scores(results[0]) == ""
    assert all(row["auc"] is None and row["psnr"] for row in results[0].rows())
    write_report(tmp_path)


def test_without_truth_there_are_scores_but_no_auc(tmp_path: Path) -> None:
    granted = record(tmp_path, rounds=3)
    for path in sorted((tmp_path / "truth").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "truth").rmdir()
    plan = Plan(adversary=f"property_inference(property='hat', {QUICK})", threat_model=granted)
    results = attack_command.attack(tmp_path, plan)
    assert "needs an audit" in attack_command.no_scores(results[0])
    assert all(row["auc"] and row["has_property"] == "" for row in results[0].rows())
    attack_command.scores(results)
    write_report(tmp_path)

"""What ``fl-privacy membership`` does once its options are read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from rich import box
from rich.table import Table

from clients.accounting import Accountant, epsilon_of
from clients.defenses.dp_sgd import DPSGD
from clients.membership import MembershipTest, choose_canary
from clients.private_training import planned, steps_of
from fl_privacy.code_digest import code_digest
from fl_privacy.component import VERSION, create, create_all
from fl_privacy.defenses import split_defenses
from fl_privacy.membership_result import MembershipError, MembershipResult
from fl_privacy.membership_run import clients_of
from fl_privacy.metrics.epsilon_bound import CONFIDENCE, epsilon_bound
from fl_privacy.printable import printable
from fl_privacy.protocols import Dataset, GradientDefense, Model, Progress, silent
from fl_privacy.recording import Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.seeding import generator
from fl_privacy.settings import RunSettings, Scalar, parse_settings
from fl_privacy.types import Samples

CANDIDATES = 64
"""Test images among which the canary is chosen."""

DELTA = 1e-5
"""Where neither the defense nor the user says another."""


class GuaranteeBroken(RuntimeError):
    """The lower bound is above the accountant's epsilon."""


def settings_of(run: Path | None, given: Mapping[str, Scalar]) -> RunSettings:
    """The settings a run was recorded with (or the defaults), under those ``given``."""
    recorded: Mapping[str, Any] = {}
    if run is not None:
        recorded = Recording(RunFolder(run).recording).manifest.run_config
    known = RunSettings().model_dump(by_alias=True)
    return parse_settings({**{k: v for k, v in recorded.items() if k in known}, **given})


@dataclass(frozen=True)
class Client:
    """The client to test; ``samples`` None: one batch."""

    defense: str
    samples: int | None
    rounds: int


def client_of(
    run: Path | None, defense: str | None, samples: int | None, rounds: int | None
) -> Client:
    """What is given, and for the rest what the run says of its clients.

    Raises:
        MembershipError: the run does not tell the defense, or several.
    """
    if run is None:
        return Client(defense or "", samples, rounds or 1)
    own = clients_of(run)
    chosen = own.defense() if defense is None else defense
    return Client(chosen, samples or own.samples(chosen), rounds or own.rounds)


def audit(
    settings: RunSettings,
    defense: str,
    *,
    samples: int | None = None,
    rounds: int = 1,
    trials: int = 1000,
    delta: float | None = None,
    progress: Progress = silent,
) -> MembershipResult:
    """Run the membership test ``trials`` times with the canary and as often without.

    Args:
        settings: model, dataset, local training and seed of the client.
        defense: its defenses, joined by ``+``; empty for none.
        samples: how many samples the client holds, the canary among them; None: one batch.
        rounds: participations in each trial.
        trials: in each of the two worlds; half of them choose the threshold.
        delta: None: the defense's own, else 1e-5.
        progress: told of every trial.

    Raises:
        ComponentError, DatasetError: a setting cannot be used.
        AccountingError: a privacy budget that cannot be met.
        MembershipError: too few trials or samples, a senseless delta, or a model without
            per-sample gradients.
    """
    if trials < 4:
        raise MembershipError(f"expected 4 trials or more in each world, got {trials}")
    if delta is not None and not 0 < delta < 1:
        raise MembershipError(f"expected a delta between 0 and 1, got {delta:g}; such as 1e-5")
    count = samples or settings.batch_size
    gradient_defense, update_defenses = split_defenses(create_all("defenses", defense))
    training = settings.local_training
    gradient_defense = planned(gradient_defense, training, samples=count, rounds=rounds)
    test = _test(settings, count, rounds, gradient_defense, update_defenses)
    start = time.perf_counter()
    present, absent = [], []
    try:
        for trial in range(trials):
            present.append(test.statistic(trial, present=True))
            absent.append(test.statistic(trial, present=False))
            progress(trial + 1, trials)
    except ValueError as error:
        raise MembershipError(
            f"{settings.model} under {defense or 'no defense'}: {error}"
        ) from None
    guarantee = _guarantee(gradient_defense, settings, count, rounds, delta)
    bound = epsilon_bound(present, absent, delta=guarantee["delta"])
    return MembershipResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        defense=defense,
        model=settings.model,
        dataset=settings.dataset,
        training=training,
        neighbors="removed" if test.sampling == "poisson" else "replaced",
        samples=count,
        rounds=rounds,
        **guarantee,
        bound=bound.epsilon,
        confidence=CONFIDENCE,
        trials=trials,
        threshold=bound.threshold,
        true_positives=(bound.true_positives, bound.present),
        false_positives=(bound.false_positives, bound.absent),
        seed=settings.seed,
        seconds=time.perf_counter() - start,
        versions={"fl-privacy": VERSION, "torch": torch.__version__},
        code_digest=code_digest(),
    )


def require_kept(result: MembershipResult) -> None:
    """Raise when the audit saw the guarantee broken.

    Raises:
        GuaranteeBroken: the lower bound is above the accountant's epsilon.
    """
    if result.violated:
        raise GuaranteeBroken(
            f"the empirical lower bound {result.bound:.3f} is above the accountant's epsilon "
            f"{result.epsilon:.3f} at delta {result.delta:g}: a bug or a broken assumption was "
            f"found (by chance this happens once in {1 / (1 - result.confidence):,.0f} audits at "
            f"most); repeat with another --seed and more --trials, and report it"
        )


def table(result: MembershipResult) -> Table:
    """The two sides of epsilon, and what they rest on."""
    shown = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False)
    for name, value in rows(result):
        shown.add_row(printable(name), printable(value))
    return shown


def rows(result: MembershipResult) -> list[tuple[str, str]]:
    """The result in pairs of words."""
    hits, alarms = result.true_positives, result.false_positives
    guarantee = "none" if result.epsilon is None else f"{result.epsilon:.3f}"
    how = f", {result.accountant}" if result.epsilon is not None else ""
    return [
        (f"epsilon at delta {result.delta:g}, guaranteed", f"{guarantee}{how}"),
        (
            "epsilon, empirical lower bound",
            f"{result.bound:.3f} (holds with {100 * result.confidence:g} %, Clopper-Pearson)",
        ),
        ("defense", result.defense or "none"),
        ("client", f"{result.model} on {result.dataset}, {result.samples} samples"),
        (
            "steps",
            f"{result.steps} in {result.rounds} {'round' if result.rounds == 1 else 'rounds'}, "
            f"sample rate {result.sample_rate:.4g}",
        ),
        ("neighbors", f"canary present, or {result.neighbors}"),
        (
            "tested on",
            f"{hits[1]} + {alarms[1]} trials: {hits[0]} true, {alarms[0]} false positives",
        ),
        ("largest bound possible", possible(result)),
        ("threshold from", f"{result.trials - hits[1]} + {result.trials - alarms[1]} other trials"),
        ("seed", f"{result.seed}, {result.seconds:.1f} s"),
    ]


def possible(result: MembershipResult) -> str:
    """What so many trials can show at most, in words."""
    most = result.largest_bound
    said = f"{most:.3f} with so many trials"
    return said if most else f"{said}: too few, so this says nothing; take --trials 1000"


def _test(
    settings: RunSettings,
    count: int,
    rounds: int,
    gradient_defense: GradientDefense | None,
    update_defenses: Any,
) -> MembershipTest:
    """The test on samples of the dataset: the canary from its test split, others from training."""
    dataset = cast(Dataset, create("datasets", settings.dataset))
    task = dataset.task()
    model = cast(Model, create("models", settings.model)).build(task, seed=settings.seed)
    draws = generator(settings.seed, "membership samples")
    own = torch.randperm(len(dataset.labels("train")), generator=draws)[:count]
    if len(own) < count:
        raise MembershipError(f"{settings.dataset} has {len(own)} training samples, got {count}")
    others = torch.randperm(len(dataset.labels("test")), generator=draws)[:CANDIDATES]
    canary = choose_canary(model, task, dataset.load("test", others.sort().values))
    rest = dataset.load("train", own)
    clipped = gradient_defense if isinstance(gradient_defense, DPSGD) else None
    return MembershipTest(
        model=model,
        task=task,
        training=settings.local_training,
        samples=Samples(
            torch.cat([canary.inputs, rest.inputs[1:]]), torch.cat([canary.labels, rest.labels[1:]])
        ),
        stand_in=Samples(rest.inputs[:1], rest.labels[:1]),
        gradient_defense=gradient_defense,
        update_defenses=update_defenses,
        noise=clipped.noise * clipped.max_norm if clipped else 0.0,
        max_norm=getattr(gradient_defense, "max_norm", math.inf),
        rounds=rounds,
        seed=settings.seed,
    )


def _guarantee(
    defense: Any, settings: RunSettings, count: int, rounds: int, delta: float | None
) -> dict[str, Any]:
    """Noise, steps and what the accountant makes of them; no epsilon without DP-SGD."""
    noise = defense.noise if isinstance(defense, DPSGD) else None
    one = steps_of(settings.local_training, count, noise=noise or 0.0)
    every = one.model_copy(update={"count": one.count * rounds})
    at = delta if delta is not None else defense.delta if isinstance(defense, DPSGD) else DELTA
    accountant: Accountant = getattr(defense, "accountant", "prv")
    epsilon = epsilon_of([every], at, accountant) if noise else math.inf
    return {
        "noise_multiplier": noise,
        "steps": every.count,
        "sample_rate": every.sample_rate,
        "epsilon": epsilon if epsilon < math.inf else None,
        "accountant": accountant,
        "delta": at,
    }

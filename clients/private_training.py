"""What a client does about DP-SGD before it trains: choose the noise, charge its account."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from clients.accounting import AccountingError, epsilon_of, noise_for, participations_within
from clients.defenses.dp_sgd import DPSGD
from clients.privacy_ledger import charge
from clients.training import require_batch
from fl_privacy.component import ComponentError, parse
from fl_privacy.privacy_spent import NoisySteps, PrivacySpent
from fl_privacy.settings import RunSettings
from fl_privacy.types import LocalTraining, Tensors


def planned(
    defense: Any, training: LocalTraining, *, samples: int, rounds: int, needed: int = 1
) -> Any:
    """The defense, with the noise that ``rounds`` rounds need where only epsilon is given.

    Anything but DP-SGD comes back as it is. Under a noise that is given, ``needed`` rounds
    have to fit into the budget.

    Raises:
        AccountingError: the budget cannot be met; the message says what could be.
    """
    if not isinstance(defense, DPSGD):
        return defense
    if defense.noise_multiplier is None and defense.epsilon is not None:
        one = steps_of(training, samples, noise=1.0)
        noise = noise_for(
            defense.epsilon, defense.delta, one.sample_rate, one.count * rounds, defense.accountant
        )
        return defense.model_copy(update={"noise_multiplier": noise})
    one = steps_of(training, samples, noise=defense.noise)
    if defense.epsilon is not None:
        _refuse_unmeetable(defense, defense.epsilon, one, needed)
    return defense


def steps_of(training: LocalTraining, samples: int, *, noise: float) -> NoisySteps:
    """The noisy steps of one participation with ``samples`` samples, as `draw_batches` takes.

    Raises:
        ValueError: no samples, or no whole batch of them.
    """
    require_batch(samples, training)
    return NoisySteps(
        noise_multiplier=noise,
        sample_rate=min(1.0, training.batch_size / samples),
        count=training.steps(samples),
    )


def take_part(
    defense: Any, settings: RunSettings, *, samples: int, folder: Path | None
) -> tuple[Any, PrivacySpent | None]:
    """The defense to train with and the account with this participation in it.

    None for anything but DP-SGD. Charged before training, see `clients.privacy_ledger`.

    Raises:
        AccountingError: the budget does not allow it, or the account cannot be kept.
        SpentError: the account cannot be read.
        ComponentError: there is no folder for it, or the strategy needs what stays private.
    """
    if not isinstance(defense, DPSGD):
        return defense, None
    refuse_loss_for(settings.strategy)
    if folder is None:
        raise ComponentError(
            "dp_sgd keeps an account of the privacy spent, and this client has no place for it: "
            "set client-state-dir to an absolute path that outlives restarts "
            "(--node-config \"client-state-dir='/var/lib/fl-privacy'\"), or in a simulation out-dir"
        )
    local, rounds = settings.local_training, settings.num_server_rounds
    noisy: DPSGD = planned(defense, local, samples=samples, rounds=rounds)
    spent = charge(
        folder,
        steps_of(local, samples, noise=noisy.noise),
        delta=noisy.delta,
        accountant=noisy.accountant,
        budget=noisy.epsilon,
    )
    return noisy, spent


def noise_of(defense: Any) -> dict[str, float]:
    """The noise multiplier that a client trains with, by name; empty without DP-SGD."""
    return {"noise_multiplier": defense.noise} if isinstance(defense, DPSGD) else {}


def without_statistics(
    returned: Tensors, sent: Tensors, parameters: Collection[str]
) -> dict[str, Tensor]:
    """The trained ``parameters`` alone; all else, which has no noise, as it was sent.

    Buffers of a network may hold anything that a forward pass writes there about the data.
    """
    return {name: returned[name] if name in parameters else value for name, value in sent.items()}


def rehearsed_privacy(defense: Any, settings: RunSettings, samples: int) -> Any:
    """Before a simulation: the defense with the noise it will use, refused as `take_part` would.

    Anything but DP-SGD comes back as it is. Where every client trains in every round, all of
    them have to fit into the budget.

    Raises:
        ValueError: the privacy budget cannot be met, or the strategy needs what stays private.
    """
    if not isinstance(defense, DPSGD):
        return defense
    refuse_loss_for(settings.strategy)
    rounds = settings.num_server_rounds
    needed = rounds if settings.fraction_train == 1 else 1
    return planned(defense, settings.local_training, samples=samples, rounds=rounds, needed=needed)


def refuse_loss_for(strategy: str) -> None:
    """Refuse a strategy that needs the training loss, which DP-SGD does not protect.

    Raises:
        ComponentError: ``strategy`` is q-FedAvg.
    """
    name, _ = parse(strategy)
    if name == "qfedavg":
        raise ComponentError(
            "qfedavg aggregates by the clients' training loss, which a client under dp_sgd keeps "
            "to itself (its value has no noise): choose another strategy"
        )


def _refuse_unmeetable(defense: DPSGD, budget: float, one: NoisySteps, needed: int) -> None:
    """Refuse a noise with which ``needed`` participations do not fit into the budget."""
    delta, accountant = defense.delta, defense.accountant
    allowed = participations_within(budget, delta, one, needed, accountant)
    if allowed == needed:
        return
    every = one.model_copy(update={"count": one.count * needed})
    noise = noise_for(budget, delta, one.sample_rate, every.count, accountant)
    raise AccountingError(
        f"a noise multiplier of {one.noise_multiplier:g} cannot keep epsilon {budget:g} at delta "
        f"{delta:g} for {needed} participations ({every.count} steps at sample rate "
        f"{one.sample_rate:.3g}): they spend {epsilon_of([every], delta, accountant):.3g}, and "
        f"{allowed} fit; {noise:.3g} or more is enough, which dp_sgd(epsilon={budget:g}) chooses"
    )

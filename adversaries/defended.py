"""The client's defense inside the objective: what an adversary that is told of it simulates.

Balunovic et al., "Bayesian Framework for Gradient Leakage", ICLR 2022: a defense is one more
part of the map from inputs to what is observed, and is inverted with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.func import grad, vmap

from adversaries.differentiability import UNSUPPORTED, first_line
from adversaries.halving import out_of_memory
from adversaries.targets import Unattackable, members_of, training_of
from fl_privacy.component import ComponentError
from fl_privacy.defenses import Defense, split_defenses, without_noise
from fl_privacy.types import Observation

Objective = Callable[..., Tensor]


def defenses_of(observation: Observation) -> tuple[Defense, ...]:
    """What of the defense that the adversary is told of can be simulated.

    Raises:
        Unattackable: a gradient defense that is not the only one, or not the first.
    """
    assert observation.defense is not None, "checked against `requires` before any work"
    found = without_noise(observation.defense)
    try:
        split_defenses(found)
    except ComponentError as error:
        raise Unattackable(f"cannot simulate the defense: {error}") from None
    return found


def check_one_step(observation: Observation) -> None:
    """Refuse to take several local steps for one and to simulate a defense of their update.

    Raises:
        Unattackable: the client took several.
    """
    training = training_of(observation)
    taken = max(training.steps(n) for n in members_of(observation.exchanges[0], training))
    if taken > 1:
        raise Unattackable(
            f"the client took {taken} local steps before its defense, which this attack takes for "
            f"one: expected local_steps='unroll' with defended=True (update_over_lr cannot)"
        )


def check_defended(
    objective: Objective, defense: Sequence[Defense], arguments: tuple[object, ...]
) -> None:
    """Try the derivative of an ``objective`` that runs the defense, for all lanes.

    Raises:
        Unattackable: it fails; names the defense and what to change.
    """
    try:
        vmap(grad(objective))(*arguments)
    except UNSUPPORTED as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise Unattackable(
            f"the defense {' + '.join(type(d).__name__ for d in defense)} does not run inside the "
            f"objective: {first_line(error)}; one that draws noise has to offer without_noise(), "
            f"and all have to run under torch.func (fl_privacy.testing.check_defense)"
        ) from None

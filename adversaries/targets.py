"""From an observation to something an attack can match: gradient units, counts, labels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adversaries.labels import infer_labels
from fl_privacy.types import Exchange, LocalTraining, Observation, Tensors


class Unattackable(ValueError):
    """This target cannot be treated by this attack; the message says why."""


@dataclass(frozen=True)
class Target:
    """One observation, ready for matching, on the CPU.

    ``observed`` holds what was seen of each linked round, in gradient units and float64;
    ``labels [images]``; ``statistics`` what batch norm told, if that is used. ``placed``
    says whether each label belongs to the image at its place: if not, and it matters which
    local batch holds it, that is part of the search.
    """

    key: str
    observed: tuple[Tensors, ...]
    labels: Tensor
    placed: bool = False
    statistics: Tensors = field(default_factory=dict)


def training_of(observation: Observation) -> LocalTraining:
    """The local training an attack may rely on.

    Raises:
        Unattackable: an optimizer whose steps we cannot simulate.
    """
    training = observation.local_training
    assert training is not None, "checked against `requires` before any work"
    if training.optimizer != "sgd":
        raise Unattackable(
            f"clients train with {training.optimizer!r}: expected 'sgd' (with momentum or weight "
            f"decay if need be); other optimizers hide the gradient behind their own state"
        )
    return training


def members_of(exchange: Exchange, training: LocalTraining) -> tuple[int, ...]:
    """Number of images of each client behind an exchange.

    Raises:
        Unattackable: unknown, or none.
    """
    if exchange.flaw:
        raise Unattackable(exchange.flaw)
    if exchange.num_examples is None:
        raise Unattackable(
            "the number of examples behind the update is unknown: expected a num-examples metric "
            "in the client's reply"
        )
    counts = tuple(training.images(n) for n in exchange.members or (exchange.num_examples,))
    if not all(counts):
        raise Unattackable(
            f"no image took part in the update (clients held {exchange.num_examples}, batch_size "
            f"{training.batch_size}): expected one whole batch, or drop_last = false"
        )
    return counts


def gradient_units(exchange: Exchange, training: LocalTraining, *, merged: int = 1) -> Tensors:
    """What was seen, as a gradient, in float64: ``-update / lr`` without the weight decay.

    ``merged`` local steps are taken for as many equal ones at the parameters sent, and their
    mean gradient is given; exact for one step, the plain approximation for more. With 0 it
    is ``-update / lr`` as it stands, for whoever unrolls the steps.

    Raises:
        Unattackable: values that are not finite.
    """
    seen = {name: -update.double() / training.lr for name, update in exchange.update.items()}
    if merged:
        # gradient k steps before the last is in k + 1 velocities, weighted 1, m, ..., m^k
        gradients = sum((merged - k) * training.momentum**k for k in range(merged))
        seen = {n: g / gradients for n, g in seen.items()}
    if merged and training.weight_decay:
        sent = exchange.parameters
        seen = {n: g - training.weight_decay * sent[n].double() for n, g in seen.items()}
    broken = [name for name, value in seen.items() if not value.isfinite().all()]
    if broken:
        raise Unattackable(f"the update holds values that are not finite, first in {broken[0]}")
    return seen


def check_linked(observation: Observation, training: LocalTraining) -> None:
    """Linked rounds can be attacked together only if they hold the same images.

    Raises:
        Unattackable: they do not, or cannot be known to.
    """
    counts = {exchange.num_examples for exchange in observation.exchanges}
    if len(counts) > 1:
        raise Unattackable(
            f"the linked rounds hold {sorted(map(str, counts))} images: expected equally many, "
            f"or unit = 'update'"
        )
    drawn = training.algorithm == "fedsgd" and training.order == "shuffled"
    if len(observation.exchanges) > 1 and drawn and counts == {training.batch_size}:
        raise Unattackable(
            "each linked round holds another random batch (fedsgd, shuffled), so they cannot be "
            "attacked together: expected unit = 'update', order = 'sequential' or algorithm = "
            "'fedavg'"
        )


def halfway(exchange: Exchange, seen: Iterable[str], steps: int) -> dict[str, Tensor]:
    """Parameters in the middle of several local steps, where the mean gradient belongs.

    Those of one step are as sent, and so are those whose update is not ``seen``.
    """
    sent = exchange.parameters
    if steps == 1:
        return dict(sent)
    moved = {n: sent[n] + 0.5 * exchange.update[n].to(sent[n].dtype) for n in seen}
    return {**sent, **moved}


def prepare(
    observation: Observation,
    model: nn.Module,
    *,
    unrolled: bool = True,
    unread: Collection[str] = (),
) -> Target:
    """What was seen of a target, and its labels, which are inferred unless granted.

    ``model`` is the `skeleton` of the observation's network; labels are not inferred from the
    parameters ``unread``.

    Raises:
        Unattackable: the target cannot be matched; the message says why.
    """
    training = training_of(observation)
    members, *_ = [members_of(exchange, training) for exchange in observation.exchanges]
    check_linked(observation, training)
    taken = max(training.steps(n) for n in members)
    rounds = observation.exchanges
    merged = 0 if unrolled and taken > 1 else taken
    units = [gradient_units(e, training, merged=merged) for e in rounds]
    seen = tuple(visible(one, observation.withheld) for one in units)
    labels, placed = observation.labels, training.order == "sequential"
    if labels is None:
        if not merged:
            units = [gradient_units(e, training, merged=taken) for e in rounds]
        mean = visible_mean(units, seen[0])
        labels = inferred(observation, model, mean, taken, sum(members), unread)
        placed = False
    return Target(observation.key, seen, labels[: sum(members)], placed)


def visible(gradient: Tensors, withheld: Collection[str]) -> dict[str, Tensor]:
    """What of a gradient is not withheld.

    Raises:
        Unattackable: nothing, or zeros.
    """
    seen = {n: g for n, g in gradient.items() if n not in withheld}
    if not seen:
        raise Unattackable(
            "every layer of the update is withheld: expected a threat model that leaves one"
        )
    if not any(g.any() for g in seen.values()):
        raise Unattackable("the update is zero everywhere, so it tells nothing")
    return seen


def visible_mean(gradients: Sequence[Tensors], seen: Iterable[str]) -> dict[str, Tensor]:
    """Mean over linked rounds of those tensors that are ``seen``."""
    return {n: torch.stack([one[n] for one in gradients]).mean(0) for n in seen}


def inferred(
    observation: Observation,
    model: nn.Module,
    gradient: Tensors,
    taken: int,
    images: int,
    unread: Collection[str],
) -> Tensor:
    """`infer_labels` of the mean ``gradient`` of ``taken`` local steps, without what is unread."""
    first = observation.exchanges[0]
    state = {**halfway(first, gradient, taken), **first.buffers}
    sent = first.global_digest if taken == 1 else None
    read = {n: g for n, g in gradient.items() if n not in unread}
    return infer_labels(
        read, model, state, observation.task, images, observation.auxiliary, same=sent
    )

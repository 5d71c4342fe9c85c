"""One global model, what clients would answer to it, and the classifiers that learn from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adversaries.auxiliary_batches import PropertyError
from adversaries.gradient_features import Classifier, features, joined
from adversaries.local_steps import Client, Sent
from adversaries.targets import gradient_units, members_of, training_of
from fl_privacy.layers import weight_layers, weight_of
from fl_privacy.types import Exchange, LocalTraining, Observation

WHOLE = "all"
"""Name of the whole update among the layers."""


@dataclass(frozen=True)
class Snapshot:
    """A global model, how many images each client behind an answer to it holds, what is seen.

    Whatever is trained for it depends on this and the seed alone, so that a score depends on
    no other exchange. ``held`` is the identity of the auxiliary data.
    """

    global_digest: str
    counts: tuple[int, ...]
    withheld: tuple[str, ...]
    held: int


@dataclass(frozen=True)
class Fitted:
    """The classifiers of one snapshot, by layer or `WHOLE`."""

    classifiers: Mapping[str, Classifier]
    layers: tuple[str, ...]
    training: LocalTraining
    one_step: bool

    def scores(self, exchange: Exchange) -> dict[str, float]:
        """Probability that the batch behind ``exchange`` has the property.

        Raises:
            Unattackable: the update holds values that are not finite.
        """
        seen = gradient_units(exchange, self.training, merged=1 if self.one_step else 0)
        found = features({n: g.unsqueeze(0) for n, g in seen.items()}, self.layers)
        return {
            name: float(
                fitted.predict_proba(
                    joined(found, self.layers if name == WHOLE else (name,)).numpy()
                )[0, 1]
            )
            for name, fitted in self.classifiers.items()
        }


def snapshot_of(observation: Observation, exchange: Exchange) -> Snapshot:
    """What an exchange answered to, and in what numbers.

    Raises:
        Unattackable: a reply that cannot be used, or an unknown number of examples.
    """
    counts = members_of(exchange, training_of(observation))
    return Snapshot(exchange.global_digest, counts, observation.withheld, id(observation.auxiliary))


def visible_layers(observation: Observation, model: nn.Module) -> tuple[str, ...]:
    """The `weight_layers` whose weights are not withheld.

    Raises:
        PropertyError: there is none.
    """
    every = weight_layers(model, observation.task)
    seen = tuple(layer for layer in every if weight_of(layer) not in observation.withheld)
    if not seen:
        raise PropertyError(
            f"the update shows the weight of no layer, of {', '.join(every) or 'none there are'}: "
            f"expected a threat model that leaves one"
        )
    return seen


def client_of(
    model: nn.Module,
    training: LocalTraining,
    counts: Sequence[int],
    exchange: Exchange,
    device: torch.device,
) -> Client:
    """The clients behind an exchange as the adversary simulates them, on ``device``."""
    model = model.to(device)
    kept = dict(model.named_buffers())
    sent = Sent(
        {n: t.float().to(device) for n, t in exchange.parameters.items()},
        {n: t.to(device) for n, t in exchange.buffers.items() if n in kept},
    )
    return Client(model=model, training=training, members=tuple(counts), sent=(sent,))

"""A membership test on a client: does its update tell whether one sample, the canary, is there?

The white-box test of Nasr et al., S&P 2021, https://arxiv.org/abs/2101.04535: the adversary
knows the model sent, the canary and the other samples, and takes the inner product of the
update with the canary's gradient, whitened by the noise and by who else may be in a batch. It
sends the same model in every round, as any server may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from clients.defending import defend_update, step_of
from clients.defenses.per_sample_clipping import per_sample_gradients
from clients.training import descend, draw_batches, private_dropout, set_mode
from fl_privacy.protocols import GradientDefense, UpdateDefense
from fl_privacy.seeding import generator
from fl_privacy.types import LocalTraining, Samples, Task

CPU = torch.device("cpu")

CANARY = 0
"""Index of the canary among the samples."""

LARGEST = 100_000_000
"""Numbers in the gradients of all samples up to which they are held at once (2 GB at work)."""


@dataclass(frozen=True)
class MembershipTest:
    """A client's round trip, with and without a canary.

    ``samples`` begin with the canary. In the other world it is left out of every batch under
    Poisson sampling (neighbors that differ by one sample, at the same sample rate), or
    ``stand_in`` takes its place where batches are shuffled. ``noise`` is the standard deviation
    of the defense's noise on the sum of gradients, ``max_norm`` what it clips each to: both
    are known to the adversary.
    """

    model: nn.Module
    task: Task
    training: LocalTraining
    samples: Samples
    stand_in: Samples
    gradient_defense: GradientDefense | None = None
    update_defenses: Sequence[UpdateDefense] = ()
    noise: float = 0.0
    max_norm: float = math.inf
    rounds: int = 1
    seed: int = 0
    sent: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        object.__setattr__(self, "sent", state)

    @property
    def sampling(self) -> str:
        """How batches are drawn."""
        return self.gradient_defense.sampling if self.gradient_defense else "shuffle"

    @cached_property
    def direction(self) -> dict[str, Tensor]:
        """The direction in which the canary shows best, of norm 1 (see `discriminant`)."""
        set_mode(self.model, self.training)
        rate = min(1.0, self.training.batch_size / len(self.samples))
        entries = len(self.samples) * sum(p.numel() for p in self.model.parameters())
        alone = rate == 1.0 or entries > LARGEST
        used = self.samples.take(torch.tensor([CANARY])) if alone else self.samples
        step = step_of(self.model, self.task, used, expected_batch_size=1)
        with private_dropout(generator(self.seed, "membership", "direction"), CPU):
            gradients = per_sample_gradients(step)
        rows = torch.cat([value.flatten(1) for value in gradients.values()], 1).double()
        rows *= (self.max_norm / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
        best = discriminant(rows[CANARY], rows[CANARY + 1 :], rate=rate, noise=self.noise)
        sizes = [value[0].numel() for value in gradients.values()]
        parts = torch.split(best.to(step.inputs), sizes)
        return {
            name: part.view_as(value[0])
            for (name, value), part in zip(gradients.items(), parts, strict=True)
        }

    def statistic(self, trial: int, *, present: bool) -> float:
        """One trial: what the rounds' updates hold along the canary's gradient, summed.

        In gradients of a sum over the batch. Every trial and world draws from its own stream.
        """
        parts = (self.seed, "membership", "present" if present else "absent", trial)
        return sum(self._round(present, *parts, number) for number in range(self.rounds))

    def _round(self, present: bool, *parts: int | str) -> float:
        self.model.load_state_dict(self.sent)
        set_mode(self.model, self.training)
        defense_draws = generator(*parts, "defense")
        batches = draw_batches(
            len(self.samples),
            self.training,
            sampling=self.sampling,
            generator=generator(*parts, "batches"),
        )
        poisson = self.sampling == "poisson"
        data = self.samples if present or poisson else self._replaced
        kept = (b if present or not poisson else b[b != CANARY] for b in batches)
        nominal = self.training.batch_size
        steps = (
            step_of(
                self.model,
                self.task,
                data.take(indices),
                expected_batch_size=nominal if poisson else len(indices),
            )
            for indices in kept
        )
        with private_dropout(generator(*parts, "dropout"), CPU):
            descend(self.model, steps, self.training, self.gradient_defense, defense_draws)
        state, _ = defend_update(
            self.sent,
            {name: value.detach().clone() for name, value in self.model.state_dict().items()},
            self.update_defenses,
            names=list(self.direction),
            generator=defense_draws,
        )
        along = [((state[n] - self.sent[n]) * u).double().sum() for n, u in self.direction.items()]
        return -float(torch.stack(along).sum()) * nominal / self.training.lr

    @cached_property
    def _replaced(self) -> Samples:
        rest = self.samples.take(torch.arange(1, len(self.samples)))
        return Samples.joined([self.stand_in, rest])


def discriminant(canary: Tensor, others: Tensor, *, rate: float, noise: float) -> Tensor:
    """Fisher's linear discriminant for the canary's gradient ``[p]``, of norm 1.

    A step adds each row g of ``others`` ``[n, p]`` with probability ``rate`` and noise to every
    entry: a covariance of rate (1 - rate) sum g g^T + noise^2 I, whose inverse times the canary
    is wanted (Woodbury). With all of them in every step that is the canary's gradient itself;
    without noise it is what of it is orthogonal to the others'.
    """
    ridge = noise * noise / (rate * (1 - rate)) if rate < 1 else math.inf
    best: Tensor = canary
    if len(others) and ridge < math.inf:
        gram = others @ others.T
        ridge = max(ridge, 1e-12 * float(gram.diagonal().max()))
        inner = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
        best = canary - others.T @ torch.linalg.solve(inner, others @ canary)
    length: Tensor = best.norm().clamp_min(torch.finfo(best.dtype).tiny)
    return best / length


@torch.no_grad()
def choose_canary(model: nn.Module, task: Task, candidates: Samples) -> Samples:
    """The candidate with the largest loss under the label that the model finds least likely.

    A canary that is surprising has a long gradient, so clipping leaves all of ``max_norm``.
    """
    outputs = model.eval()(task.normalize(candidates.inputs))
    labels = outputs.argmin(1)
    losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
    chosen = int(losses.argmax())
    return Samples(candidates.inputs[chosen : chosen + 1], labels[chosen : chosen + 1])

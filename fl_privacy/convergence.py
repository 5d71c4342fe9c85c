"""Convergence of FedAvg on strongly convex losses, with and without Soteria: theorem 2.

Li et al.: On the Convergence of FedAvg on Non-IID Data, ICLR 2020,
https://arxiv.org/abs/1907.02189, theorem 2 (``K`` devices a round), which Sun et al.: Soteria,
CVPR 2021, https://arxiv.org/abs/2012.06043, extend to pruned gradients (r).

**What the extension leaves out.** Pruning adds ``eps * Lambda_s``, a bound on the squared
distance of a pruned gradient from the plain one (`pruning_error`), to the variances and to
``G^2``. Those of Li et al. belong to gradients that are right on average; a pruned gradient is
not, and its error does not vanish with the step size. Where the mean pruned gradient is zero,
the loss is above its minimum by a constant, so that a bound that tends to 0 has to fail in the
end: it is the paper's formula, not a theorem that we can prove. With ``pruned=0`` it is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fl_privacy.operator_norms import matrix_norm


@dataclass(frozen=True)
class Assumptions:
    """The constants of theorem 2; losses F_k of devices k with weights p_k, F = sum p_k F_k.

    Attributes:
        mu: every F_k is mu-strongly convex (the L2 penalty).
        smoothness: L; every F_k has an L-Lipschitz gradient.
        weights: p_k ``[devices]``, which sum to 1.
        variances: sigma_k^2 ``[devices]``; of a batch's gradient about the device's, summed
            over coordinates.
        gradient: G^2; bound of the mean squared norm of a batch's gradient.
        heterogeneity: Gamma = F* - sum p_k F_k*.
        distance: ||w_1 - w*||^2, mean squared distance of the first weights from the best.
        pruned: eps, the number of pruned features; 0 without Soteria.
        column: Lambda_s, bound of the squared norm of one pruned feature's column.
    """

    mu: float
    smoothness: float
    weights: Sequence[float]
    variances: Sequence[float]
    gradient: float
    heterogeneity: float
    distance: float
    pruned: int = 0
    column: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.mu <= self.smoothness:
            raise ValueError(
                f"expected 0 < mu <= smoothness, got {self.mu} and {self.smoothness}; mu is the "
                f"L2 penalty (weight decay) where the loss is convex without it"
            )
        if len(self.weights) != len(self.variances) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(
                f"expected weights that sum to 1, one for each of {len(self.variances)} "
                f"variances, got {len(self.weights)} with sum {sum(self.weights)}"
            )

    @property
    def error(self) -> float:
        """``eps * Lambda_s``: what pruning adds to variances and squared gradients."""
        return self.pruned * self.column


def delay(assumed: Assumptions, local_steps: int) -> float:
    """gamma = max(8 kappa, E), with kappa = L / mu."""
    return max(8 * assumed.smoothness / assumed.mu, float(local_steps))


def step_size(assumed: Assumptions, local_steps: int, t: int) -> float:
    """eta_t = 2 / (mu (gamma + t)), for local step ``t`` counted from 0 over all rounds."""
    return 2 / (assumed.mu * (delay(assumed, local_steps) + t))


def variance_term(assumed: Assumptions, local_steps: int) -> float:
    """Q = sum p_k^2 (eps Lambda_s + sigma_k^2) + 6 L Gamma + 8 (E-1)^2 (eps Lambda_s + G^2)."""
    spread = sum(
        p**2 * (assumed.error + variance)
        for p, variance in zip(assumed.weights, assumed.variances, strict=True)
    )
    drift = 8 * (local_steps - 1) ** 2 * (assumed.error + assumed.gradient)
    return spread + 6 * assumed.smoothness * assumed.heterogeneity + drift


def sampling_term(assumed: Assumptions, local_steps: int, participants: int) -> float:
    """C = (4 / K) E^2 (eps Lambda_s + G^2); 0 where all devices take part (theorem 1)."""
    if participants == len(assumed.weights):
        return 0.0
    return 4 / participants * local_steps**2 * (assumed.error + assumed.gradient)


def bound(assumed: Assumptions, *, local_steps: int, participants: int, steps: int) -> float:
    """Theorem 2: how far E[F(w_T)] is above F* at most, after ``steps`` = T local steps.

    ``2 kappa / (gamma + T) * ((Q + C) / mu + (mu gamma / 2) ||w_1 - w*||^2)`` for the steps of
    `step_size`, ``local_steps`` E between averages, and ``participants`` K devices a round,
    drawn with replacement by their weights, or without where the weights are equal.
    """
    gamma, kappa = delay(assumed, local_steps), assumed.smoothness / assumed.mu
    noise = variance_term(assumed, local_steps) + sampling_term(assumed, local_steps, participants)
    first = assumed.mu * gamma / 2 * assumed.distance
    return 2 * kappa / (gamma + steps) * (noise / assumed.mu + first)


def steps_until(
    assumed: Assumptions, *, local_steps: int, participants: int, level: float
) -> float:
    """After how many local steps the `bound` is ``level``; 0 where it is less from the start."""
    gamma = delay(assumed, local_steps)
    start = bound(assumed, local_steps=local_steps, participants=participants, steps=0)
    return max(0.0, gamma * (start / level - 1))


def softmax_smoothness(features: Tensor, mu: float) -> float:
    """L of softmax regression on ``features [n, d]`` (a constant column for the bias included).

    The Hessian is the mean of (diag p - p p^T) x x^T, whose first factor is at most 1/2, plus
    the penalty: ``L <= lambda_max(X^T X / n) / 2 + mu`` (Böhning, 1992).
    """
    return matrix_norm(features) ** 2 / (2 * len(features)) + mu


def pruning_error(delta: Tensor, representation: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of a pruned from the plain weight gradient, and its bound.

    One sample's are ``delta r^T`` and ``delta r'^T`` with ``delta = dL/db [n, classes]``,
    ``r [n, features]`` and ``r' = r`` where ``keep``, else 0. The distance squared is the sum
    of the pruned features' columns', ``||delta||^2 r_i^2``, hence at most ``eps * Lambda_s``:
    their number times the largest. Both ``[n]``.
    """
    columns = delta.square().sum(1, keepdim=True) * (representation * ~keep).square()
    return columns.sum(1), (~keep).sum(1) * columns.max(1).values

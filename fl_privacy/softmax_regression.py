"""Softmax regression with an L2 penalty over devices: losses, minima, the constants of theorem 2.

``F_k(W) = mean_i CE(W x_i, y_i) + mu / 2 ||W||^2`` over the samples of device k, ``F`` the mean
of the F_k. Weights are ``[..., classes, features]``; features hold a constant 1 for the bias,
which is penalized too, as the weight decay of SGD does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from fl_privacy.convergence import Assumptions, softmax_smoothness


@dataclass(frozen=True)
class Federation:
    """Equal devices: ``features [devices, n, d]``, ``labels [devices, n]``, ``keep`` like features.

    ``keep`` is False where Soteria prunes the weight gradient's column for that sample.
    """

    features: Tensor
    labels: Tensor
    keep: Tensor
    classes: int
    mu: float

    @property
    def pruned(self) -> int:
        """eps: the largest number of pruned features of a sample."""
        return int((~self.keep).sum(2).max())

    @cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """``||x||^2`` and the largest pruned ``x_i^2`` of every sample, ``[devices, n]``."""
        of_features = self.features.square()
        return of_features.sum(2), (of_features * ~self.keep).amax(2)


@dataclass(frozen=True)
class Moments:
    """Largest over devices, or each ``[devices]``, at some weights; see `Assumptions`."""

    variances: Tensor
    gradient: float
    column: float


def slopes(federation: Federation, weights: Tensor) -> Tensor:
    """``dCE/d(W x)`` of every sample, ``[devices, n, classes]``; weights may differ by device."""
    logits = federation.features @ weights.mT
    return logits.softmax(-1) - F.one_hot(federation.labels, federation.classes).to(logits)


def losses(federation: Federation, weights: Tensor) -> Tensor:
    """F_k ``[devices]`` at ``weights [classes, d]`` or ``[devices, classes, d]``."""
    logits = federation.features @ weights.mT
    of_samples = F.cross_entropy(
        logits.flatten(0, 1), federation.labels.flatten(), reduction="none"
    )
    penalty = federation.mu / 2 * weights.square().sum((-2, -1))
    return of_samples.view_as(federation.labels).mean(1) + penalty


def gradients(federation: Federation, weights: Tensor, *, pruned: bool = False) -> Tensor:
    """Gradients of the F_k ``[devices, classes, d]``, or their means of pruned samples'."""
    seen = federation.features * federation.keep if pruned else federation.features
    mean = slopes(federation, weights).mT @ seen / seen.shape[1]
    return mean + federation.mu * weights


def minimum(federation: Federation, *, each: bool) -> tuple[Tensor, Tensor, float]:
    """Best weights and losses: of each device's F_k, or of F (then ``[1]``).

    The last value bounds the excess of the mean loss: ``||grad||^2 / (2 mu)``, mean over devices.
    By L-BFGS in float64.
    """
    devices, _, d = federation.features.shape
    shape = (devices if each else 1, federation.classes, d)

    def objective(flat: Any) -> Any:
        weights = torch.from_numpy(flat).view(shape)
        whole = weights if each else weights[0]
        gradient = gradients(federation, whole)
        gradient = gradient if each else gradient.mean(0, keepdim=True) * devices
        return float(losses(federation, whole).sum()), gradient.flatten().numpy()

    options: Any = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-7}
    start = np.zeros(shape).ravel()
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    weights = torch.from_numpy(found.x).view(shape)
    left = gradients(federation, weights if each else weights[0])
    left = left if each else left.mean(0, keepdim=True)
    excess = float(left.square().sum((1, 2)).mean()) / (2 * federation.mu)
    values = losses(federation, weights if each else weights[0])
    return weights, values if each else values.mean(0, keepdim=True), excess


def moments(federation: Federation, weights: Tensor, batch: int) -> Moments:
    """sigma_k^2, G^2 and Lambda_s at ``weights [classes, d]``.

    Of gradients of ``batch`` samples drawn without replacement: a sample's variance over
    ``batch``, times (n - batch) / (n - 1).
    """
    delta = slopes(federation, weights).square().sum(2)
    n = delta.shape[1]
    mean = gradients(federation, weights)
    plain = (mean - federation.mu * weights).square().sum((1, 2))
    second = (delta * federation.squares[0]).mean(1)
    variances = (second - plain).clamp_min(0) / batch * (n - batch) / (n - 1)
    gradient = float((mean.square().sum((1, 2)) + variances).max())
    return Moments(variances, gradient, float((federation.squares[1] * delta).max()))


def measured(
    federation: Federation,
    visited: list[Tensor],
    *,
    batch: int,
    best: Tensor,
    gap: float,
) -> Assumptions:
    """The constants of theorem 2, with the largest moments at the ``visited`` weights.

    ``best [classes, d]`` is w*, ``gap`` is Gamma; the first of ``visited`` is w_1. That moments
    are no larger elsewhere is assumed, not proved.
    """
    found = [moments(federation, weights, batch) for weights in visited]
    devices = len(federation.features)
    return Assumptions(
        mu=federation.mu,
        smoothness=max(softmax_smoothness(x, federation.mu) for x in federation.features),
        weights=[1 / devices] * devices,
        variances=torch.stack([m.variances for m in found]).amax(0).tolist(),
        gradient=max(m.gradient for m in found),
        heterogeneity=gap,
        distance=float((visited[0] - best).square().sum()),
        pruned=federation.pruned,
        column=max(m.column for m in found),
    )

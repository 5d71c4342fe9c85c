"""What it costs to move a feature to zero: the scores by which Soteria prunes.

Sun et al.: Soteria, CVPR 2021, https://arxiv.org/abs/2012.06043, algorithm 1.
Pruning feature ``r_i`` asks of an adversary who matches the pruned features an input
``X + dX`` with ``r_i(X + dX) = 0``. To first order the shortest one has
``||dX||_p = |r_i| / ||dr_i/dX||_q`` with ``1/p + 1/q = 1`` (Hoelder's inequality, which is
tight), so q is 2 for p = 2, infinity for p = 1 and 1 for p = infinity.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Generator, Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import jvp, vjp, vmap

from clients.defenses.soteria_layer import Features
from clients.defenses.windowed_convolution import CheapSlopes


def costs(features: Tensor, norms: Tensor) -> Tensor:
    """``|r_i| / ||dr_i/dX||``, and 0 for features that are exactly zero; ``[n, d]``.

    An active feature without slope costs infinity: to first order no input moves it.
    """
    return torch.where(features == 0, 0, features.abs() / norms)


def batch_costs(features: Tensor, norms: Tensor) -> Tensor:
    """One cost a feature for the whole batch, ``[1, d]``: ``1 / sum_s ||dr_si/dX|| / |r_si|``.

    This is how the authors' code adds up: the ratios of slope to feature over the samples in
    which it is active (dead ones add 0), and the smallest sums are pruned. That code adds 0.1
    to the feature in the attack on ConvNet and leaves it its sign, so that a batch's ratios may
    cancel; we do neither. Behind ReLU or sigmoid there is no sign.
    """
    ratios = torch.where(features == 0, 0, norms / features.abs())
    return 1 / ratios.sum(0, keepdim=True)


def exact_norms(
    features: Features, inputs: Tensor, *, dual: float = 2, mixing: bool = False, lanes: int = 32
) -> Tensor:
    """``||dr_i/dX||`` in the ``dual`` norm, ``[n, d]``; 0 for features that are exactly zero.

    A vector-Jacobian product a feature, without gradients of weights, ``lanes`` at a time.
    Where samples do not mix, X is the sample's own input. Where they do (``mixing``: batch norm
    in train mode), X is the whole batch, which takes ``n`` times as long. Inside a
    ``torch.func`` transform dead features cannot be skipped and are computed too.
    """
    if mixing:
        return _exact_norms(features, inputs, dual, lanes)
    return torch.cat([_exact_norms(features, x, dual, lanes) for x in torch.split(inputs, 1)])


def _exact_norms(features: Features, inputs: Tensor, dual: float, lanes: int) -> Tensor:
    with nullcontext() if transformed() else CheapSlopes():
        values, pullback = vjp(features, inputs)[:2]
    flat = values.detach().flatten()
    numbers = torch.arange(len(flat), device=flat.device)
    wanted = numbers if transformed() else numbers[flat != 0]

    def slope(cotangent: Tensor) -> Tensor:
        (gradient,) = pullback(cotangent.view_as(values))
        norm: Tensor = torch.linalg.vector_norm(gradient, ord=dual)
        return norm

    norms = torch.zeros_like(flat)
    for part in torch.split(wanted, lanes) if len(wanted) else ():
        one_hot = (part[:, None] == numbers).to(flat)
        norms = norms.index_put((part,), vmap(slope)(one_hot))
    return norms.where(flat != 0, 0).view_as(values)


def sketched_norms(
    features: Features,
    inputs: Tensor,
    *,
    probes: int,
    generator: Generator,
    mixing: bool = False,
    lanes: int = 32,
) -> Tensor:
    """An estimate of ``||dr_i/dX||_2`` from Jacobian-vector products, ``[n, d]``.

    ``||dr_i/dX||^2 = E[(dr_i/dX v)^2]`` over standard normal ``v``: the mean over ``probes``
    of them is unbiased for the square, with relative variance ``2 / probes``. A probe serves
    all features of all samples (where they mix, of the whole batch), so a sample's estimate
    does not depend on its mates. Probes are drawn on the CPU; ``lanes`` products run at once.
    """
    shape = inputs.shape if mixing else inputs.shape[1:]
    with temporarily_clear_interpreter_stack():  # vmap refuses random numbers: these are constants
        drawn = torch.randn(probes, *shape, generator=generator, dtype=torch.float32)
    drawn = drawn.to(inputs)
    together = len(inputs) if mixing else max(1, lanes // probes)
    chunks = (x.clone() for x in torch.split(inputs, together))  # a view's tangent is its base's
    groups = [_squares(features, x, drawn, lanes) for x in chunks]
    return (torch.cat(groups) / probes).sqrt()


def _squares(features: Features, inputs: Tensor, probes: Tensor, lanes: int) -> Tensor:
    """Sum over the probes of the squared slopes along them, ``[n, d]``."""

    def slopes(probe: Tensor) -> Tensor:
        tangent: Tensor = jvp(features, (inputs,), (probe.expand_as(inputs),))[1]
        return tangent

    parts = torch.split(probes, max(1, lanes // len(inputs)))
    found = (vmap(slopes)(part) for part in parts)
    return torch.stack(
        [(s.float() if s.dtype == torch.bfloat16 else s).square().sum(0) for s in found]
    ).sum(0)


def shrunk(norms: Tensor, active: Tensor, probes: int) -> Tensor:
    """Sketched norms drawn toward the geometric mean of their sample's, ``[n, d]``; biased.

    The logarithm of a sketched square is that of the square plus the logarithm of a chi-square
    of ``probes`` degrees over ``probes``, whose mean and variance are known. The norms' own
    spread is what is left of the observed one, and each logarithm keeps its share of it.
    """
    half = torch.tensor(probes / 2, dtype=norms.dtype, device=norms.device)
    noise = torch.polygamma(1, half) / 4
    usable = active & (norms > 0)
    logs = norms.where(usable, 1).log() - (torch.digamma(half) - math.log(probes / 2)) / 2
    count = usable.sum(1, keepdim=True)
    mean = logs.where(usable, 0).sum(1, keepdim=True) / count.clamp_min(1)
    spread = (logs - mean).where(usable, 0).square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
    own = (1 - noise / spread.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
    return (mean + own * (logs - mean)).exp().where(usable, 0)


def transformed() -> bool:
    """Whether a ``torch.func`` transform is running, in which nothing may wait for values."""
    return torch._C._functorch.peek_interpreter_stack() is not None

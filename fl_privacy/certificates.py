"""What a distance between representations says about the distance between inputs.

Theorem 1 of Soteria (Sun et al., CVPR 2021, https://arxiv.org/abs/2012.06043), with p = 2:
``||X - X'|| >= ||r - r'|| / ||grad_X f||`` for the feature extractor ``f``, ``r = f(X)`` and the
pruned ``r'``. Three different numbers go by that formula; here each has its own name. All
distances are L2 norms; inputs are pixels in the task's range, one image of ``[*input_shape]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import jvp, vjp

from fl_privacy.hooks import hooked
from fl_privacy.types import Task

Features = Callable[[Tensor], Tensor]
"""Pixels ``[*input_shape]`` to the features ``[features]`` that a dense layer sees."""


def features_of(model: nn.Module, layer: str, task: Task) -> Features:
    """The feature extractor of ``layer`` for one image, differentiable; ``model`` as it is.

    Raises:
        ValueError: no such layer, or it does not run.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"no layer {layer!r}; the model's: {', '.join(filter(None, modules))}")

    def features(image: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = modules[layer].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with hooked([hook]):
            model(task.normalize(image.unsqueeze(0)))
        if not seen:
            raise ValueError(f"{layer!r} does not run in a forward pass; choose another layer")
        return seen[0].flatten()

    return features


def certified_bound(representation: Tensor, other: Tensor, lipschitz: float) -> float:
    """``||r - f(X')|| / Lip f``: no ``X'`` whose representation is ``other`` is closer to X.

    **Binds every** ``X'``, however found, whose representation ``f(X')`` is ``other``, if
    ``lipschitz`` bounds f on the segment from X to X', such as `lipschitz_product` does
    everywhere. It needs that X' to be known (or ``f(X')`` at least), so it says how far a
    *given* reconstruction is at least. ``representation`` is ``f(X) [features]``; pixels.
    """
    return float((representation - other).double().norm()) / lipschitz


def pruned_representation_value(representation: Tensor, pruned: Tensor, lipschitz: float) -> float:
    """``||r - r'|| / Lip f`` with the pruned ``r'``: theorem 1 as the paper applies it.

    Binds an ``X'`` with ``f(X') = r'`` and **no attacker who does anything else**: who matches
    other layers, leaves out the defended one, or matches only what was not pruned, does not
    aim at ``r'`` (nor need an image with that representation exist). Not a lower bound on the
    error of reconstructions. With the norm of the Jacobian at X for ``lipschitz`` it is
    `first_order_estimate`. Both ``[features]``; pixels.
    """
    return certified_bound(representation, pruned, lipschitz)


def first_order_estimate(representation: Tensor, other: Tensor, jacobian_norm: float) -> float:
    """``||r - r'|| / ||grad_X f(X)||`` with the norm at X alone: what the paper computes.

    **Binds nothing**: it is the distance at which f would reach ``other`` if it were linear
    and moved along its steepest direction; f may be steeper elsewhere (then inputs are closer)
    or never get there. Pixels.
    """
    return float((representation - other).double().norm()) / jacobian_norm


def jacobian_norm(features: Features, image: Tensor) -> float:
    """The largest singular value of ``df/dX`` at ``image``, by Lanczos (features by pixels).

    An estimate to about 1e-6, not rounded up; for `first_order_estimate`.
    """
    inputs = image.detach()

    def twice(direction: Any) -> Any:
        """The Jacobian's transpose times the Jacobian times ``direction``."""
        tangent = torch.from_numpy(direction).to(inputs).view_as(inputs)
        along = jvp(features, (inputs,), (tangent,))[1]
        back = vjp(features, inputs)[1](along)[0]
        return back.detach().flatten().double().cpu().numpy()

    n = inputs.numel()
    start = np.random.default_rng(0).standard_normal(n)
    operator = LinearOperator((n, n), matvec=twice, dtype=np.float64)
    squares = eigsh(operator, k=1, tol=1e-6, v0=start, return_eigenvectors=False)
    return math.sqrt(max(float(squares[0]), 0.0))

"""A step of an optimizer as a bare list of tensor operations.

What `torch.func` composes (lanes, gradients of gradients) is worked out in Python anew at
each call, which on small networks takes as long as the arithmetic. Run once under a
tracer, it leaves a graph of the operations that reached the device; calling that graph
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

WORTHWHILE = 100
"""Calls from which the tracing, which takes as long as some 100 of them, pays off."""

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The state of all lanes to its gradient and to the objectives ``[lanes]``."""


def replayable(step: Step, example: Tensor, *, calls: int, compiled: bool = False) -> Step:
    """``step`` for ``calls`` calls with states like ``example``; everything else is fixed.

    With ``compiled`` it goes through `torch.compile` instead, which keeps its kernels for
    later steps of the same shapes.
    """
    if compiled:
        return torch.compile(step)
    if calls < WORTHWHILE:
        return step
    graph = make_fx(step)(example)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph

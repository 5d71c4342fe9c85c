"""L-BFGS for many independent problems at once, without waiting for any of them.

Each lane is in its own state: it looks along its direction for a step that satisfies the
weak Wolfe conditions (Armijo 1e-4, curvature 0.9) by doubling and bisection (Lewis and
Overton, "Nonsmooth optimization via quasi-Newton methods", 2013), or it has just accepted
one and builds the next direction from its own history (Nocedal and Wright, "Numerical
Optimization", algorithm 7.4). One evaluation serves all lanes, whatever state each is in,
so a lane that diverges or waits neither stops nor delays the others, and nothing on the
way has to be read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ARMIJO, CURVATURE = 1e-4, 0.9
LONGEST_SEARCH = 25
"""Trials along one direction before the history is dropped and the slope is tried."""

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points ``[lanes, n]`` to gradients ``[lanes, n]`` and values ``[lanes]``."""


@dataclass
class _State:
    """All lanes; ``moves`` and ``turns [memory, lanes, n]``, ``curvatures [memory, lanes]``.

    The history is a ring: evaluation ``i`` writes slot ``i % memory`` of every lane, and a
    lane that did not accept gets no curvature there, so its slot changes nothing.
    """

    point: Tensor
    value: Tensor
    slope: Tensor
    direction: Tensor
    step: Tensor
    low: Tensor
    high: Tensor
    trials: Tensor
    moves: Tensor
    turns: Tensor
    curvatures: Tensor
    scale: Tensor


def minimize(
    evaluate: Evaluate,
    start: Tensor,
    *,
    evaluations: int,
    memory: int = 40,
    advance: Callable[[int, Tensor], None] = lambda done, values: None,
) -> tuple[Tensor, Tensor]:
    """Minimize each lane of ``start [lanes, n]`` with ``evaluations`` calls of ``evaluate``.

    Returns the best point of each lane, by its own value, and that value. A lane whose
    start is not finite keeps its start.
    """
    slope, value = evaluate(start)
    state = _begin(start, value, slope, memory)
    for i in range(1, evaluations):
        trial = state.point + state.step[:, None] * state.direction
        slope, value = evaluate(trial)
        accepted = _search(state, value, slope)
        _accept(state, accepted, trial, value, slope, newest=i % memory)
        _give_up(state)
        advance(i, state.value)
    return state.point, state.value


def _begin(start: Tensor, value: Tensor, slope: Tensor, memory: int) -> _State:
    lanes, n = start.shape
    zeros, ones = start.new_zeros(lanes), start.new_ones(lanes)
    history = start.new_zeros(memory, lanes, n)
    return _State(
        point=start.clone(),
        value=value,
        slope=slope,
        direction=-slope,
        step=_first_step(slope),
        low=zeros.clone(),
        high=ones * torch.inf,
        trials=zeros.clone(),
        moves=history,
        turns=history.clone(),
        curvatures=start.new_zeros(memory, lanes),
        scale=ones.clone(),
    )


def _first_step(slope: Tensor) -> Tensor:
    """``min(1, 1 / |slope|_1)``, as is usual for the first trial along the plain slope."""
    return (1 / slope.abs().sum(1).clamp(min=1e-30)).clamp(max=1.0)


def _search(state: _State, value: Tensor, slope: Tensor) -> Tensor:
    """Which lanes accept their trial; the others get their next step length."""
    descent = (state.slope * state.direction).sum(1)
    low_enough = value <= state.value + ARMIJO * state.step * descent
    low_enough &= value.isfinite() & slope.isfinite().all(1)
    flat_enough = (slope * state.direction).sum(1) >= CURVATURE * descent
    accepted = low_enough & flat_enough
    state.high = torch.where(low_enough, state.high, state.step)
    state.low = torch.where(low_enough, state.step, state.low)
    doubled = 2 * state.low
    halved = (state.low + state.high) / 2
    state.step = torch.where(state.high.isinf(), doubled, halved)
    state.trials = state.trials + 1
    return accepted


def _accept(
    state: _State, accepted: Tensor, trial: Tensor, value: Tensor, slope: Tensor, *, newest: int
) -> None:
    """Move accepted lanes, remember their move, and give them a new direction."""
    _remember(state, accepted, trial - state.point, slope - state.slope, newest)
    row = accepted[:, None]
    state.point = torch.where(row, trial, state.point)
    state.value = torch.where(accepted, value, state.value)
    state.slope = torch.where(row, slope, state.slope)
    direction = _two_loops(state, newest)
    downhill = (direction * state.slope).sum(1) < 0
    direction = torch.where(downhill[:, None], direction, -state.slope)
    state.direction = torch.where(row, direction, state.direction)
    state.step = torch.where(accepted, torch.ones_like(state.step), state.step)
    _restart_search(state, accepted)


def _remember(state: _State, accepted: Tensor, move: Tensor, turn: Tensor, newest: int) -> None:
    """Write the newest slot of the history; lanes without a useful pair leave it empty."""
    curvature, square = (move * turn).sum(1), turn.square().sum(1)
    kept = accepted & (curvature > 1e-10 * square)
    row = kept[:, None]
    state.moves[newest] = torch.where(row, move, 0.0)
    state.turns[newest] = torch.where(row, turn, 0.0)
    state.curvatures[newest] = torch.where(kept, curvature, 0.0)
    state.scale = torch.where(kept, curvature / square.clamp(min=1e-300), state.scale)


def _two_loops(state: _State, newest: int) -> Tensor:
    """``-H slope`` of every lane; empty slots have zero curvature and change nothing."""
    used = state.curvatures > 0
    inverse = torch.where(used, 1 / state.curvatures.clamp(min=1e-300), 0.0)
    memory = len(inverse)
    newest_first = [(newest - back) % memory for back in range(memory)]
    q = state.slope
    weights = []
    for k in newest_first:
        weight = inverse[k] * (state.moves[k] * q).sum(1)
        q = torch.addcmul(q, weight[:, None], state.turns[k], value=-1)
        weights.append(weight)
    r = state.scale[:, None] * q
    for k, weight in zip(reversed(newest_first), reversed(weights), strict=True):
        correction = weight - inverse[k] * (state.turns[k] * r).sum(1)
        r = torch.addcmul(r, correction[:, None], state.moves[k])
    return -r


def _give_up(state: _State) -> None:
    """Lanes that searched too long forget their history and follow the slope."""
    stuck = state.trials >= LONGEST_SEARCH
    state.curvatures = torch.where(stuck, 0.0, state.curvatures)
    state.scale = torch.where(stuck, 1.0, state.scale)
    state.direction = torch.where(stuck[:, None], -state.slope, state.direction)
    state.step = torch.where(stuck, _first_step(state.slope), state.step)
    _restart_search(state, stuck)


def _restart_search(state: _State, lanes: Tensor) -> None:
    state.low = torch.where(lanes, 0.0, state.low)
    state.high = torch.where(lanes, torch.inf, state.high)
    state.trials = torch.where(lanes, 0.0, state.trials)

"""Whether the truth is what it is scored as, before an attack spends hours on it."""

from __future__ import annotations

from collections.abc import Sequence

from fl_privacy.plan import AnalysisError
from fl_privacy.result_rows import members_of
from fl_privacy.truth import TruthVault
from fl_privacy.types import Observation, Samples, Task

TOLERANCE = 1e-3
"""How far a pixel may lie outside the task's range, as a share of that: rounding does."""

REMEDY = "write pixels as they are before normalization, or correct the task"


def check_truth(observations: Sequence[Observation], vault: TruthVault) -> None:
    """Compare the first truth that is found with the task; nothing else is done with it.

    Raises:
        AnalysisError: its inputs have another shape, or values outside the task's range.
        TruthError: it is damaged.
    """
    if not vault.root.exists():
        return
    exchanges = (e for o in observations for e in members_of(o.exchanges))
    first = next((e for e in exchanges if vault.has(e)), None)
    if first is None:
        return
    where = f"{vault.root}: truth of node {first.node} in round {first.round}"
    for samples in vault.steps(first):
        if wrong := misfit(samples, observations[0].task):
            raise AnalysisError(f"{where}: {wrong}; {REMEDY}")


def misfit(truth: Samples, task: Task) -> str:
    """How inputs ``[n, *input_shape]`` miss the shape or range of a task; empty if they fit."""
    shape = tuple(truth.inputs.shape[1:])
    if shape != task.input_shape:
        return f"expected inputs of shape {task.input_shape} each, got {shape}"
    if not truth.inputs.numel():
        return ""
    slack = TOLERANCE * (task.high - task.low)
    least, most = float(truth.inputs.min()), float(truth.inputs.max())
    if task.low - slack <= least and most <= task.high + slack:
        return ""
    return f"expected inputs in {task.low:g}..{task.high:g}, got {least:.4g}..{most:.4g}"

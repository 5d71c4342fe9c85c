"""How many examples a client may claim: the server weighs it by that number."""

from __future__ import annotations

from fl_privacy.types import LocalTraining

MOST_EXAMPLES = 1_000_000
"""A client that claims more examples than this is not believed."""


def most_examples(training: LocalTraining | None) -> int:
    """The most examples that a client can have used in one round; one batch in FedSGD."""
    if training is not None and training.algorithm == "fedsgd":
        return training.batch_size
    return MOST_EXAMPLES


def claim_flaw(claimed: float, most: int) -> str:
    """What is wrong with a claim of ``claimed`` examples (NaN is), or nothing."""
    if 1 <= claimed <= most:
        return ""
    return f"the client claims {claimed} examples: expected 1 to {most}"

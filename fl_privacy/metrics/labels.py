"""How many of a batch's labels the server knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.metrics.matching import reconstruction
from fl_privacy.types import Result, Samples


def overlap(labels: Tensor, truth: Tensor) -> float:
    """Share of the true labels ``[m]`` found in ``labels [n]``, counted as multisets.

    Of more than ``m`` labels only the first ``m`` count. NaN when there is no truth.
    """
    if len(truth) == 0:
        return float("nan")
    found = Counter(labels[: len(truth)].tolist()) & Counter(truth.tolist())
    return found.total() / len(truth)


class LabelAccuracy(Component):
    """Share of the batch's labels that were inferred, whatever their order."""

    unit: ClassVar[str] = "share of labels"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value in [0, 1] for each result, ``[results]`` float64."""
        if len(results) != len(truths):
            raise ValueError(
                f"label_accuracy needs one truth for each of the {len(results)} results, "
                f"got {len(truths)}"
            )
        shares = [
            overlap(reconstruction(result, "label_accuracy").labels, truth.labels)
            for result, truth in zip(results, truths, strict=True)
        ]
        return torch.tensor(shares, dtype=torch.float64)

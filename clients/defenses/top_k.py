"""Top-k sparsification: only the k largest entries of an update are sent.

Aji, Heafield: Sparse Communication for Distributed Gradient Descent, EMNLP 2017,
https://arxiv.org/abs/1704.05021, without its residuals: a defense has no memory.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Generator

from clients.defenses.largest import keep_largest, kept_stats
from fl_privacy.component import Component
from fl_privacy.types import Stats, Tensors


class TopK(Component):
    """Keeps the ``k`` entries of largest magnitude of the whole update, or the ``share`` of them.

    All others become zero; of equal ones the first stay. ``share=s`` keeps ``round(s * n)`` of n
    entries, at least one.
    """

    k: Annotated[int | None, Field(ge=1, description="entries to keep")] = None
    share: Annotated[float | None, Field(gt=0, le=1, description="share of entries to keep")] = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.k is None) == (self.share is None):
            raise ValueError(
                "expected either k, a number of entries, or share, such as top_k(share=0.01); "
                f"got k={self.k}, share={self.share}"
            )
        return self

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The masked update; the shares of entries and of squared length that are left.

        Draws nothing. Linear in the entries that stay, and constant in the others.
        """
        entries = sum(value.numel() for value in update.values())
        keep = self.k if self.k is not None else max(1, round((self.share or 0.0) * entries))
        kept = keep_largest(update, keep)
        return kept, kept_stats(update, kept)

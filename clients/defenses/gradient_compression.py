"""Gradient compression: the small entries of an update are not sent.

Lin et al.: Deep Gradient Compression, ICLR 2018, https://arxiv.org/abs/1712.01887; as a defense
in Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019, section 5.2,
https://arxiv.org/abs/1906.08935, and in Sun et al. (Soteria), CVPR 2021,
https://arxiv.org/abs/2012.06043. Nothing is carried over to the next round (Lin et al. accumulate
what was left out): a defense has no memory.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Generator

from clients.defenses.largest import keep_largest, kept_stats
from fl_privacy.component import Component
from fl_privacy.types import Stats, Tensors


class GradientCompression(Component):
    """Zeroes the share ``rate`` of the update's entries, those of smallest magnitude.

    Exactly ``round(rate * n)`` of n entries, of equal ones the last; over the whole model as in
    the papers, or ``per`` tensor as in the authors' code of Soteria (which takes a percentile as
    threshold: a count that differs by one at most, and by the number of equal entries).
    """

    rate: Annotated[float, Field(ge=0, le=1, description="share of the entries to zero")] = 0.9
    per: Annotated[
        Literal["model", "tensor"], Field(description="share of the whole model or of each tensor")
    ] = "model"

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The masked update; the shares of entries and of squared length that are left.

        Draws nothing. Linear in the entries that stay, and constant in the others.
        """
        groups = [update] if self.per == "model" else [{n: v} for n, v in update.items()]
        kept: Tensors = {
            name: value
            for group in groups
            for name, value in keep_largest(group, self._kept(group)).items()
        }
        return kept, kept_stats(update, kept)

    def _kept(self, group: Tensors) -> int:
        entries = sum(value.numel() for value in group.values())
        return entries - round(self.rate * entries)

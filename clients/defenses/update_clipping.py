"""Clipping of the whole update: what bounds one client's influence in a round.

McMahan et al.: Learning Differentially Private Recurrent Language Models, ICLR 2018,
https://arxiv.org/abs/1710.06963 ("flat clipping"). Without noise it gives no guarantee, and
gradient inversion that looks at directions alone does not notice it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator

from clients.defenses.norms import global_norm
from fl_privacy.component import Component
from fl_privacy.types import PositiveFloat, Stats, Tensors


class UpdateClipping(Component):
    """Scales the update down to L2 norm ``max_norm`` over all its tensors together.

    ``max_norm`` is in weight units, those of the update (returned minus sent).
    """

    max_norm: Annotated[PositiveFloat, Field(description="largest L2 norm, in weight units")]

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The clipped update; its norm before, and ``clipped``, 1 if it was longer than allowed.

        Draws nothing. Twice differentiable where the norm differs from ``max_norm``.
        """
        norm = global_norm(update)
        clipped = norm > self.max_norm
        factor = torch.where(clipped, self.max_norm / torch.where(clipped, norm, 1.0), 1.0)
        return (
            {name: value * factor.to(value) for name, value in update.items()},
            {"update_norm": norm.detach(), "clipped": clipped.to(torch.float32)},
        )

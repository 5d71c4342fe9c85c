"""Withholding of layers: what a trusted execution environment would hide.

Mo et al.: PPFL: Privacy-preserving Federated Learning with Trusted Execution Environments,
MobiSys 2021, https://arxiv.org/abs/2104.14380, and Quantifying Information Leakage from
Gradients, https://arxiv.org/abs/2105.13929, which layers to choose. There the layers are still
trained, inside the enclaves; here the federation does without their updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Generator

from fl_privacy.component import Component, ComponentError
from fl_privacy.parameter_names import within
from fl_privacy.types import Stats, Tensors


class Withhold(Component):
    """Zeroes the update of whole layers: the global values go back, and no key is missing.

    ``layers`` are names of parameters (``classifier.weight``) or of the modules that hold them
    (``classifier``); one name needs no list. Buffers, batch-norm statistics among them,
    are no part of an update and go out as they are.
    """

    layers: Annotated[
        tuple[str, ...], Field(min_length=1, description="parameters or the modules that hold them")
    ]

    @field_validator("layers", mode="before")
    @classmethod
    def _several(cls, layers: object) -> object:
        return (layers,) if isinstance(layers, str) else layers

    def defend_update(self, update: Tensors, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The update with zeros for the withheld layers, and their share of its entries.

        Draws nothing.

        Raises:
            ComponentError: a name that fits no parameter; lists those there are.
        """
        for layer in self.layers:
            if not any(within(name, layer) for name in update):
                raise ComponentError(
                    f"withhold: no parameter {layer!r} and none inside it; expected some of "
                    f"{', '.join(layers_of(update))}"
                )
        hidden = {name for name in update if any(within(name, layer) for layer in self.layers)}
        entries = sum(value.numel() for value in update.values())
        withheld = sum(update[name].numel() for name in hidden)
        return (
            {n: torch.zeros_like(v) if n in hidden else v for n, v in update.items()},
            {"withheld_share": withheld / max(entries, 1)},
        )


def layers_of(names: Iterable[str]) -> list[str]:
    """Parameters and the modules that hold them, each before what it holds."""
    parts = (name.split(".") for name in names)
    prefixes = (".".join(p[:depth]) for p in parts for depth in range(1, len(p) + 1))
    return list(dict.fromkeys(prefixes))

"""Update defenses on the gradient of every local step, in the papers' units.

Gradient-inversion papers add noise to *gradients* or compress them (Zhu, Liu, Han: Deep Leakage
from Gradients, NeurIPS 2019, section 5, https://arxiv.org/abs/1906.08935). With one local step
that is the update over ``-lr``; with several it acts before every step.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field, field_validator
from torch import Generator, Tensor
from torch.func import functional_call, grad

from fl_privacy.component import Component, ComponentError, create_all, name_of, spec_of_all
from fl_privacy.defenses import without_noise
from fl_privacy.protocols import UpdateDefense
from fl_privacy.types import Stats, Step, Tensors


class EachStep(Component):
    """Applies update defenses, joined by ``+``, to the mean gradient of each local step.

    ``each_step(defense='gaussian_noise(scale=1e-2)')`` is noise of standard deviation 1e-2 on
    the gradient; scales and norms are in **gradient units**. Momentum and weight decay come
    after it, so with them an entry whose gradient was zeroed still moves.
    """

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "shuffle"

    defense: Annotated[str, Field(description="update defenses joined by +, quoted")]

    @field_validator("defense")
    @classmethod
    def _exists(cls, spec: str) -> str:
        update_defenses(spec)
        return spec

    @cached_property
    def defenses(self) -> tuple[UpdateDefense, ...]:
        """The defenses that the spec names, in order."""
        return update_defenses(self.defense)

    def without_noise(self) -> EachStep | None:
        """The same at each step, of what the defenses leave without their noise."""
        left = cast(tuple[Component, ...], without_noise(self.defenses))
        return EachStep(defense=spec_of_all("defenses", left)) if left else None

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The defended mean gradient; the defenses' statistics, prefixed with their class names.

        As differentiable as the defenses are.
        """
        gradient: Tensors = mean_gradient(step)
        stats: dict[str, float | Tensor] = {}
        for defense in self.defenses:
            gradient, of_defense = defense.defend_update(gradient, generator=generator)
            name = type(defense).__name__
            stats |= {f"{name}/{key}": value for key, value in of_defense.items()}
        return gradient, stats


def update_defenses(spec: str) -> tuple[UpdateDefense, ...]:
    """The update defenses of a spec such as ``top_k(k=9)+gaussian_noise(scale=0.1)``.

    Raises:
        ComponentError: none, an unknown one, or one that does not act on updates.
    """
    defenses = create_all("defenses", spec)
    wrong = [name_of("defenses", d) for d in defenses if not isinstance(d, UpdateDefense)]
    if wrong or not defenses:
        raise ComponentError(
            "expected update defenses joined by +, such as gaussian_noise(scale=0.01), "
            f"got {', '.join(wrong) or 'none'}"
        )
    return defenses


def mean_gradient(step: Step) -> dict[str, Tensor]:
    """Sum of the samples' gradients over ``Step.expected_batch_size``, by parameter.

    Batch norm in train mode sees the batch; its running statistics in ``step`` stay.
    """

    def loss(parameters: Tensors) -> Tensor:
        buffers = {name: value.clone() for name, value in step.buffers.items()}
        outputs = functional_call(step.model, {**parameters, **buffers}, (step.inputs,))
        return step.loss(outputs, step.labels).sum() / step.expected_batch_size

    gradient: dict[str, Tensor] = grad(loss)(dict(step.parameters))
    return gradient

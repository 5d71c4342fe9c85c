"""R-GAP: Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adversaries.analytic import one_image, reconstruction, seen_input, solve_each
from adversaries.layer_inversion import LINEAR, Solution, inverse, least_squares, system
from adversaries.matching import Chunk
from adversaries.targets import Unattackable, training_of
from adversaries.tracing import Link, chain, probe
from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import (
    Failure,
    Observation,
    Outcome,
    PositiveFloat,
    PositiveInt,
    Reconstruction,
)

DISAGREEMENT = 0.01
"""Relative residual beyond which the equations of a layer contradict each other."""


class RGAP(Component):
    """Go back layer by layer from a dense layer with a bias to the image.

    The first such layer gives its input (`adversaries.analytic.layer_input`) and the
    gradient with respect to it. Activations are inverted. The input ``x`` of a convolution
    (or a dense layer) with known output ``z`` solves the linear system of ``W x = z - b``
    and ``dL/dW = sum over positions of dL/dz * patches(x)`` by least squares in float64.
    A layer whose system has a smaller rank than unknowns is refused. ``loss`` is the
    largest relative residual of the systems.

    Deviations from the paper: it starts in closed form from a bias instead of solving for
    the slope of the loss; the rows of ``W x = z - b`` are weighted by the slope of the
    activation behind them, as rounding errors grow by its inverse (on saturated sigmoids
    the picture is lost without that), and the two blocks have equal norms. One image, one
    local step; of linked rounds the first is used. Nothing is random.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"local_training"})
    tolerance: Annotated[
        PositiveFloat, Field(description="smaller singular values, over the largest, count as zero")
    ] = 1e-7
    most_unknowns: Annotated[
        PositiveInt, Field(description="refuse layers with more, whose systems fill the memory")
    ] = 4096

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Reconstruction | Failure]:
        """Solve each target by itself on the CPU; ``seed`` and ``device`` are not used."""
        yield from solve_each(observations, self.image_of, progress)

    def image_of(self, chunk: Chunk) -> Reconstruction:
        """The image behind the only target of a chunk.

        Raises:
            Unattackable: the network, the batch or a layer's system does not allow it.
        """
        observation, (target,) = chunk.observation, chunk.targets
        links = chain(sent_model(observation), probe(observation.task).double())
        *before, start = links[: first_dense(links) + 1]
        one_image(chunk.images, start.name)
        one_step(chunk)
        observed = target.observed[0]
        values = seen_input((observed,), start.name)
        slope = start.back(values, observed[f"{start.name}.bias"])
        trust, residual = torch.ones_like(values), 0.0
        for link in reversed(before):
            if isinstance(link.module, LINEAR):
                gradient = observed.get(f"{link.name}.weight")
                solution = self.solve(link, values, trust, slope, gradient)
                values, residual = solution.values, max(residual, solution.residual)
                trust = torch.ones_like(values)
            else:
                values = inverse(link, values)
                trust = link.back(values, trust)
            slope = link.back(values, slope)
        found = reconstruction(target, observation.task, values)
        return replace(found, loss=residual, outcome=outcome(residual))

    def solve(
        self, link: Link, values: Tensor, trust: Tensor, slope: Tensor, gradient: Tensor | None
    ) -> Solution:
        """The input of a linear layer; see `system`.

        Raises:
            Unattackable: the system is too large, or does not determine the input.
        """
        unknowns = prod(link.shape)
        if unknowns > self.most_unknowns:
            raise Unattackable(
                f"the input of {link} has {unknowns} unknowns: expected at most "
                f"{self.most_unknowns}, which most_unknowns sets (memory grows with the square)"
            )
        solution = least_squares(*system(link, values, trust, slope, gradient), self.tolerance)
        if solution.rank < unknowns:
            raise Unattackable(
                f"the input of {link} is not determined: its equations have rank {solution.rank} "
                f"for {unknowns} unknowns; expected a layer with more channels or smaller strides, "
                f"or another attack such as gradient_similarity"
            )
        return solution


def outcome(residual: float) -> Outcome:
    """Whether the layers' equations agree, which those of a plain gradient do."""
    if residual > DISAGREEMENT:
        return Outcome(
            "partial",
            f"the equations of a layer disagree by {residual:.0%}: the update is no plain "
            f"gradient (noise, compression, another model?), so the picture may be wrong; try "
            f"gradient_similarity",
        )
    return Outcome("completed")


def sent_model(observation: Observation) -> nn.Module:
    """The network as it was sent, in float64 and eval mode."""
    exchange = observation.exchanges[0]
    model = copy.deepcopy(observation.model()).eval().double().requires_grad_(False)
    model.load_state_dict({**exchange.parameters, **exchange.buffers}, strict=False)
    return model


def first_dense(links: Sequence[Link]) -> int:
    """Position of the first dense layer with a bias.

    Raises:
        Unattackable: there is none.
    """
    for i, link in enumerate(links):
        dense = isinstance(link.module, nn.Linear) and link.module.bias is not None
        if dense and len(link.shape) == 1:
            return i
    raise Unattackable(
        "no dense layer with a bias sees one vector an image, so there is nowhere to start: "
        "expected one, or another attack such as gradient_similarity"
    )


def one_step(chunk: Chunk) -> None:
    """Check that the update is the gradient of one local step.

    Raises:
        Unattackable: it is the sum of several.
    """
    steps = training_of(chunk.observation).steps(chunk.images)
    if steps != 1:
        raise Unattackable(
            f"the client took {steps} local steps, so the update is no gradient: expected one "
            f"step; gradient_similarity unrolls several"
        )

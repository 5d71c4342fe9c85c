"""Matching the inferred representation alone: Sun et al., Soteria, CVPR 2021, figure 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from adversaries.analytic import one_image, seen_input
from adversaries.gradient_matching import Advance, Found, GradientMatching, Problem
from adversaries.matching import Batch
from adversaries.objectives import relative_distance
from adversaries.signed_adam import minimize
from adversaries.targets import Target, Unattackable
from adversaries.tracing import dense_inputs, probe
from fl_privacy.types import NonNegativeFloat, Observation, PositiveFloat, Task, Tensors


class RepresentationMatching(GradientMatching):
    """Search an input with the representation that the gradient of a dense layer gives away.

    The representation ``r`` is what a dense layer with a bias sees: exact for one image
    (`adversaries.analytic.layer_input`). Minimizes ``|f(x) - r|^2 / |r|^2 + tv * TV(x)``
    by Adam on the sign of the gradient, ``f`` being the network up to that layer. With
    ``nonzero`` only the entries of ``r`` that are not zero count, which is what a
    defender who prunes the representation leaves. The paper writes down no optimizer;
    ours is that of gradient similarity, and the default ``tv`` was chosen on training
    images that no published figure of ours uses. One image a batch; of several local steps
    the representations differ, so they need ``local_steps="ignore"``.
    """

    layer: Annotated[str, Field(description="dense layer; empty: the first with a bias")] = ""
    layers: Annotated[Literal["all"], Field(description="not used: see layer")] = "all"
    defended: Annotated[Literal[False], Field(description="not used: see nonzero")] = False
    tv: Annotated[NonNegativeFloat, Field(description="weight of the total variation")] = 3e-4
    lr: Annotated[PositiveFloat, Field(description="first step size, normalized units")] = 0.1
    signed: Annotated[bool, Field(description="feed Adam the sign of the gradient")] = True
    boxed: Annotated[bool, Field(description="clamp to the pixel range after each step")] = True

    def prepare(self, observation: Observation, model: nn.Module) -> Target:
        """The representation in place of the gradient.

        Raises:
            Unattackable: several images or local steps, or no such layer.
        """
        target = super().prepare(observation, model)
        layer = dense_layer(model, observation.task, self.layer)
        one_image(len(target.labels), layer)
        training = observation.local_training
        assert training is not None, "checked against `requires` before any work"
        steps = training.steps(1)
        if steps > 1 and self.local_steps == "unroll":
            raise Unattackable(
                f"the client took {steps} local steps, each with a representation of its own: "
                f"expected one step, or local_steps='ignore' to take their mixture for one"
            )
        seen = tuple({layer: seen_input((one,), layer)} for one in target.observed)
        if not all(one[layer].any() for one in seen):
            raise Unattackable(f"the representation that {layer} sees is zero everywhere")
        return replace(target, observed=seen)

    def simulate(self, batch: Batch, inputs: Tensor, labels: Tensor) -> tuple[Tensors, ...]:
        """What every dense layer sees of ``inputs``, for each linked round."""
        client = batch.client
        states = [{**sent.parameters, **sent.buffers} for sent in client.sent]
        seen = [dense_inputs(client.model, state, inputs) for state in states]
        return tuple({name: its[0] for name, its in one.items()} for one in seen)

    def distance(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Squared distance over the squared length of the inferred representation."""
        return relative_distance(simulated, observed)

    def optimize(self, problem: Problem, inputs: Tensor, advance: Advance) -> Found:
        """Signed Adam on the inputs."""
        return minimize(problem, inputs, self, advance)


def dense_layer(model: nn.Module, task: Task, name: str) -> str:
    """``name`` if it is a dense layer with a bias, the first of them if it is empty.

    Raises:
        Unattackable: there is no such layer; the message lists those there are.
    """
    layers = list(dense_inputs(model, {}, probe(task)))
    if not layers:
        raise Unattackable(
            "the network has no dense layer with a bias that sees one vector an image: "
            "expected one, or another attack such as gradient_similarity"
        )
    if name and name not in layers:
        raise Unattackable(
            f"layer={name!r} is no dense layer with a bias: expected one of {', '.join(layers)}"
        )
    return name or layers[0]

"""How close inferred representations are to the true ones: Soteria, table 1.

Sun et al.: Soteria, CVPR 2021, section 3.2, https://arxiv.org/abs/2012.06043.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.dense_layers import dense_tail, seen_when_sent
from fl_privacy.metrics.preparing import MetricError
from fl_privacy.types import Observation, Reconstruction, Representations, Result, Samples


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors ``[features]``, float64.

    0 where ``a`` is constant, since it then tells nothing; NaN where ``b``, the truth, is.
    """
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    if not b.any():
        return float("nan")
    return float((a @ b) / (a.norm() * b.norm())) if a.any() else 0.0


def classes_in(labels: Tensor) -> Tensor:
    """The classes among ``labels [n]``, ascending, each once."""
    return torch.bincount(labels.cpu()).nonzero().flatten()


def classes_of(result: Result) -> Tensor:
    """The classes a result says are there, ascending.

    Raises:
        TypeError: it says nothing of classes.
    """
    if isinstance(result, Representations):
        return classes_in(result.classes)
    if isinstance(result, Reconstruction):
        return classes_in(result.labels)
    raise TypeError(f"expected representations or reconstructions, got {type(result).__name__}")


class RepresentationCorrelation(Component):
    """Pearson correlation of inferred and true class-mean representation at a dense layer.

    The representation is what the layer sees: of the paper's FC1, FC2, FC3 (r) the first,
    second and last dense layer. True is the mean over the client's own samples of the class
    with the parameters the client was *sent* (`seen_when_sent`). A result's score is the
    mean over the classes that are present; one that was not found counts as 0. With
    ``truth="other"`` each class is compared with the next one that the same client holds:
    what the correlation is worth without the right class, NaN where a client has one class.
    Of reconstructed inputs the representation is computed.

    Layers share a pattern over all inputs, so high values need no leak: read them beside
    ``truth="other"`` and the guesses.
    """

    layer: Annotated[str, Field(description="dense layer; empty: mean over all of them")] = ""
    truth: Annotated[
        Literal["own", "other"], Field(description="of the class, or of the client's next class")
    ] = "own"

    unit: ClassVar[str] = "correlation"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False
    kinds: ClassVar[tuple[type, ...]] = (Representations, Reconstruction)

    def check_observed(self, observation: Observation) -> None:
        """Refuse a network without the layer.

        Raises:
            MetricError: lists the layers there are.
        """
        tail = dense_tail(observation.model(), observation.task)
        if not tail:
            raise MetricError(
                "representation_correlation needs a network that ends in dense layers with a row "
                "a class: leave this score out"
            )
        if self.layer and self.layer not in tail:
            raise MetricError(
                f"representation_correlation(layer={self.layer!r}): expected one of the dense "
                f"layers that end the network, {', '.join(tail)}"
            )

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """Not without the network.

        Raises:
            MetricError: always; see `score_observed`.
        """
        raise MetricError("representation_correlation is scored with the observations")

    def score_observed(
        self,
        results: Sequence[Result],
        truths: Sequence[Samples],
        observations: Sequence[Observation],
    ) -> Tensor:
        """One value in [-1, 1] for each result, ``[results]`` float64; inputs are pixels.

        NaN where the result has no such layer.
        """
        scored = zip(results, truths, observations, strict=True)
        return torch.tensor([self._score(*one) for one in scored], dtype=torch.float64)

    def _score(self, result: Result, truth: Samples, observation: Observation) -> float:
        classes = classes_in(truth.labels)
        true = class_means(seen_when_sent(observation, truth.inputs), truth.labels)
        inferred = inferred_means(result, observation)
        layers = [self.layer] if self.layer else list(true)
        if not set(layers) <= inferred.keys() or (self.truth == "other" and len(classes) < 2):
            return float("nan")
        return sum(self._at(inferred[n], true[n], classes) for n in layers) / len(layers)

    def _at(self, inferred: Mapping[int, Tensor], true: Mapping[int, Tensor], c: Tensor) -> float:
        """The mean over the classes ``c`` at one layer."""
        compared = c.roll(-1) if self.truth == "other" else c
        pairs = zip(c.tolist(), compared.tolist(), strict=True)
        values = [pearson(inferred[i], true[j]) if i in inferred else 0.0 for i, j in pairs]
        return sum(values) / len(values)


def class_means(seen: Mapping[str, Tensor], labels: Tensor) -> dict[str, dict[int, Tensor]]:
    """Layer -> class -> mean of what the layer sees of its samples, ``[features]``."""
    return {
        name: {int(c): value[labels == c].mean(0) for c in classes_in(labels)}
        for name, value in seen.items()
    }


def inferred_means(result: Result, observation: Observation) -> dict[str, dict[int, Tensor]]:
    """The same of a result; what a reconstruction holds is sent through the network."""
    if isinstance(result, Representations):
        return {
            name: {int(c): row for c, row in zip(result.classes, rows, strict=True)}
            for name, rows in result.layers.items()
        }
    if isinstance(result, Reconstruction):
        inputs = result.inputs.detach().cpu().nan_to_num(nan=0.0)
        return class_means(seen_when_sent(observation, inputs), result.labels.cpu())
    raise TypeError(f"expected representations or reconstructions, got {type(result).__name__}")


class _ClassInference(Component):
    """Of sets of classes; what their size is compared with is what the two scores differ in."""

    unit: ClassVar[str] = "share of classes"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False
    kinds: ClassVar[tuple[type, ...]] = (Representations, Reconstruction)


class ClassPrecision(_ClassInference):
    """Share of the inferred classes that the client holds."""

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value in [0, 1] for each result, ``[results]`` float64; NaN where it has none."""
        return shares(results, truths, lambda found, true: len(found & true) / len(found))


class ClassRecall(_ClassInference):
    """Share of the client's classes that were inferred."""

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value in [0, 1] for each result, ``[results]`` float64."""
        return shares(results, truths, lambda found, true: len(found & true) / len(true))


def shares(
    results: Sequence[Result],
    truths: Sequence[Samples],
    share: Callable[[set[int], set[int]], float],
) -> Tensor:
    """``share`` of the inferred and the true classes of each result; NaN where one is empty."""
    sets = [
        (set(classes_of(r).tolist()), set(t.labels.tolist()))
        for r, t in zip(results, truths, strict=True)
    ]
    values = [share(*both) if all(both) else float("nan") for both in sets]
    return torch.tensor(values, dtype=torch.float64)

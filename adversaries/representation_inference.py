"""Which classes a client holds and what its dense layers see of them: Soteria, section 3.2.

Sun et al.: Soteria, CVPR 2021, https://arxiv.org/abs/2012.06043. The paper describes the
observation, not an algorithm; ours is a reconstruction, and where it could be read in
several ways there is a setting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adversaries.matching import Chunk, attack_chunks
from adversaries.targets import Target, Unattackable, prepare
from fl_privacy.component import Component
from fl_privacy.dense_layers import dense_tail
from fl_privacy.layers import weight_of
from fl_privacy.protocols import Progress, silent
from fl_privacy.types import Failure, Observation, Outcome, Representations, Tensors

Pick = Literal["largest", "loudest", "own"]


class RepresentationInference(Component):
    """Read the classes and their representations off the gradients of the dense layers.

    ``classes`` says which are present: those that `infer_labels` counts, or ``rows``, the
    paper's own sign, those whose row of the last layer's weight gradient is long. After many
    local steps counting names classes that are not there, and long rows miss some. What that
    layer sees of a class is proportional to minus its row, because the samples of a class
    push their own row hardest. An element of that representation names a row of the layer
    before, which is proportional to what that one sees; it is turned so that it adds up to no
    less than zero, as representations behind a ReLU do. So on down to the first dense layer.

    ``pick`` says which element names the row: the ``largest``; the ``loudest``, times the
    length of the row it names, since a row to which classes contribute with opposite signs
    is short and mixed up; or the one that is most the class's ``own``, for which the
    largest share of it in another class found is taken off first.

    Exact for one sample and one step. With several samples a row mixes the classes, and how
    much of a correlation with the truth is the mean activation that all classes share has to
    be measured beside it (`representation_guess`, and `representation_correlation` against
    another class). Of several local steps the mean gradient is taken.
    """

    classes: Annotated[
        Literal["counts", "rows"],
        Field(description="present: labels counted, or long rows of the last layer"),
    ] = "counts"
    threshold: Annotated[
        float,
        Field(gt=0, le=1, description="rows: least length, as a share of the longest"),
    ] = 0.5
    pick: Annotated[Pick, Field(description="which element names the row of the layer before")] = (
        "largest"
    )

    requires: ClassVar[frozenset[str]] = frozenset({"local_training"})

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Representations | Failure]:
        """Solve each target in closed form; nothing is random and ``device`` is not used."""

        def solve(chunk: Chunk) -> list[Representations]:
            start = time.perf_counter()
            (target,) = chunk.targets
            gradient, tail = target.observed[0], dense_tail(chunk.model, chunk.observation.task)
            layers, outcome = visible_tail(tail, gradient)
            classes = self.present(chunk, gradient[weight_of(layers[-1])])
            found = representations(gradient, layers, classes, self.pick)
            progress(chunk.done + 1, len(observations))
            seconds = time.perf_counter() - start
            return [Representations(target.key, classes, found, outcome, seconds)]

        yield from attack_chunks(observations, 1, solve, prepare_one)

    def present(self, chunk: Chunk, last: Tensor) -> Tensor:
        """The classes ``[c]`` taken to be present, ascending; ``last [classes, features]``."""
        if self.classes == "counts" or chunk.observation.labels is not None:
            return torch.bincount(chunk.targets[0].labels).nonzero().flatten()
        return long_rows(last, self.threshold)


def prepare_one(observation: Observation, model: nn.Module) -> Target:
    """The mean gradient of one update; its labels are inferred unless granted.

    Raises:
        Unattackable: several linked rounds, or an update that cannot be used.
    """
    if len(observation.exchanges) > 1:
        raise Unattackable(
            f"the representation changes with the network, and {len(observation.exchanges)} rounds "
            f"are linked: expected unit = 'update' (or 'aggregate')"
        )
    return prepare(observation, model, unrolled=False)


def visible_tail(tail: tuple[str, ...], gradient: Tensors) -> tuple[tuple[str, ...], Outcome]:
    """Those layers of ``tail`` whose weights, and those of all behind them, are seen.

    Raises:
        Unattackable: there is none; the message says what to do.
    """
    if not tail:
        raise Unattackable(
            "the network ends in no dense layer with a row a class that sees one vector an image: "
            "expected one, or another attack such as gradient_similarity"
        )
    hidden = [i for i, name in enumerate(tail) if weight_of(name) not in gradient]
    seen = tail[hidden[-1] + 1 :] if hidden else tail
    if not seen:
        raise Unattackable(
            f"the gradient of {tail[-1]}.weight is withheld, where classes and representations "
            f"are read: expected a threat model that shows it"
        )
    if not gradient[weight_of(seen[-1])].any():
        raise Unattackable(
            f"the gradient of {seen[-1]}.weight is zero everywhere: expected one that tells classes"
        )
    if not hidden:
        return seen, Outcome("completed", f"inferred what {', '.join(seen)} see; no picture")
    withheld = f"{tail[hidden[-1]]}.weight is withheld, so nothing before {seen[0]} is inferred"
    return seen, Outcome("partial", withheld)


def long_rows(weight: Tensor, threshold: float) -> Tensor:
    """Rows of ``weight [classes, features]`` at least ``threshold`` as long as the longest."""
    lengths: Tensor = weight.norm(dim=1)
    return (lengths >= threshold * lengths.max()).nonzero().flatten()


def representations(
    gradient: Tensors, layers: Sequence[str], classes: Tensor, pick: Pick
) -> Mapping[str, Tensor]:
    """What each of ``layers`` sees of each class, ``[c, features]``, float64, in forward order.

    A row is divided by the size of its bias gradient where that is seen, which for one
    sample gives the representation itself; otherwise its scale means nothing.
    """
    *others, last = layers
    found = {last: -read(gradient, last, classes)}
    for name, after in zip(reversed(others), reversed(layers), strict=False):
        rows = picked(found[after], gradient[weight_of(name)].norm(dim=1), pick)
        found[name] = turned(read(gradient, name, rows))
    return {name: found[name] for name in layers}


def read(gradient: Tensors, layer: str, rows: Tensor) -> Tensor:
    """Rows ``[c, features]`` of a layer over the size of their bias gradients where not zero."""
    seen, bias = gradient[weight_of(layer)][rows], gradient.get(f"{layer}.bias".lstrip("."))
    if bias is None:
        return seen
    size = bias[rows].abs()[:, None]
    return torch.where(size > 0, seen / size.clamp(min=1e-300), seen)


def turned(rows: Tensor) -> Tensor:
    """``rows [c, features]``, each with the sign with which it adds up to zero or more."""
    return torch.where(rows.sum(1, keepdim=True) < 0, -rows, rows)


def picked(seen: Tensor, lengths: Tensor, pick: Pick) -> Tensor:
    """The element of each of ``seen [c, features]`` that names a row, ``[c]``.

    ``lengths [features]`` are those of the rows.
    """
    if pick == "largest":
        return seen.argmax(1)
    shares = seen.clamp(min=0)
    shares = shares / shares.norm(dim=1, keepdim=True).clamp(min=1e-300)
    if pick == "own" and len(shares) > 1:
        others = [torch.cat([shares[:i], shares[i + 1 :]]).amax(0) for i in range(len(shares))]
        shares = shares - torch.stack(others)
    loudest: Tensor = (shares * lengths).argmax(1)
    return loudest

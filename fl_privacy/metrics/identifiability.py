"""Whether a reconstruction tells which image it was made of, among many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fl_privacy import component
from fl_privacy.component import Component
from fl_privacy.metrics.lpips import LPIPS, is_picture, lpips_each
from fl_privacy.metrics.matching import in_unit_range, matched_pairs, pixels
from fl_privacy.metrics.preparing import MetricError
from fl_privacy.protocols import Dataset
from fl_privacy.seeding import generator
from fl_privacy.types import PositiveInt, Result, Samples, Task

Distance = Literal["mse", "lpips"]


def identified(inputs: Tensor, truth: Tensor, others: Tensor, distance: Distance) -> Tensor:
    """Whether each of ``inputs [k, *shape]`` is nearer to its truth than to any of ``others``.

    ``truth [k, *shape]``, ``others [m, *shape]``, all in unit range; bool ``[k]``. An image
    of ``others`` that is identical to the truth is no rival; one as near as the truth is.
    """
    if len(inputs) == 0:
        return torch.zeros(0, dtype=torch.bool)
    if distance == "mse":
        own, theirs = squared_distances(inputs, truth, others)
    else:
        own = lpips_each(inputs, truth)
        theirs = torch.stack([lpips_each(one.expand_as(others), others) for one in inputs])
    rivals = torch.stack([(others != one).flatten(1).any(1) for one in truth])
    return ~((theirs <= own[:, None]) & rivals).any(1)


def squared_distances(inputs: Tensor, truth: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of ``inputs`` to their truths ``[k]`` and to all others ``[k, m]``.

    ``|x - g|^2 = |x|^2 - 2 <x, g> + |g|^2``: one matrix product.
    """
    x, t, g = inputs.flatten(1), truth.flatten(1), others.flatten(1)
    own = (x - t).square().sum(1)
    theirs = x.square().sum(1, keepdim=True) - 2 * x @ g.T + g.square().sum(1)
    return own, theirs


@lru_cache(maxsize=2)
def gallery_of(spec: str, size: int, seed: int) -> Tensor:
    """At most ``size`` images of a dataset's test split, ``[m, *shape]`` in unit range.

    Drawn without replacement from ``seed``; loaded once for all targets.

    Raises:
        ComponentError, DatasetError: there is no such data here.
    """
    source: Dataset = component.create("datasets", spec)
    order = torch.randperm(len(source.labels("test")), generator=generator(seed, "gallery"))
    drawn = in_unit_range(source.load("test", order[:size]), source.task())
    return pixels(drawn.inputs)


class Identifiability(Component):
    """Share of a result's images whose nearest one in a gallery is the true one.

    The gallery of an image is its truth and ``size`` others (fewer if the test split of the
    dataset ``gallery`` holds fewer; a result says how many). Blind luck finds the truth
    with probability ``1 / (1 + size)``.
    """

    gallery: Annotated[
        str, Field(description="dataset whose test split is the gallery; empty: the run's")
    ] = ""
    size: Annotated[PositiveInt, Field(description="images beside the true one")] = 1000
    distance: Annotated[Distance, Field(description="what makes an image the nearest")] = "mse"
    seed: Annotated[int, Field(description="seed of the choice of images")] = 0

    unit: ClassVar[str] = "share of images"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = False

    def prepared(self, dataset: str, task: Task) -> Identifiability:
        """With the gallery named and loaded, and its true size.

        Raises:
            MetricError: no gallery, one of other inputs than the task's, or no weights.
            ComponentError, DatasetError: the gallery cannot be had here.
        """
        spec = self.gallery or dataset
        if not spec:
            raise MetricError(
                "identifiability needs a gallery and the recording names no data set: give one, "
                "such as identifiability(gallery='fashion-mini')"
            )
        source: Dataset = component.create("datasets", spec)
        theirs = source.task()
        expected = task.input_shape, task.low, task.high
        got = theirs.input_shape, theirs.low, theirs.high
        if got != expected:
            raise MetricError(
                f"identifiability cannot use the gallery {spec}: expected inputs of shape and "
                f"range {expected}, got {got}; name a gallery of such inputs"
            )
        if self.distance == "lpips":
            if not is_picture(task.input_shape):
                raise MetricError(
                    f"identifiability(distance='lpips') needs images, got inputs of shape "
                    f"{task.input_shape}; use distance='mse'"
                )
            LPIPS().prepared(spec, task)
        size = min(self.size, len(source.labels("test")))
        gallery_of(spec, size, self.seed)
        return self.model_copy(update={"gallery": spec, "size": size})

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """One value in [0, 1] for each result, ``[results]`` float64.

        Raises:
            MetricError: it names no gallery and was not `prepared`.
        """
        if not self.gallery:
            raise MetricError("identifiability was not prepared: expected gallery='DATASET'")
        others = gallery_of(self.gallery, self.size, self.seed)
        shares = [
            float(identified(*pair, others, self.distance).double().mean())
            for pair in matched_pairs(results, truths, "identifiability")
        ]
        return torch.tensor(shares, dtype=torch.float64)

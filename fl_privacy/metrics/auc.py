"""How well scores tell batches with a property from batches without it: the area under the ROC.

DeLong, DeLong and Clarke-Pearson: Comparing the areas under two or more correlated receiver
operating characteristic curves, *Biometrics* 44, 1988. Of several batches a client: Obuchowski,
Nonparametric analysis of clustered ROC curve data, *Biometrics* 53, 1997.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy import stats
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.metrics.statistics import LEVEL, Interval, Numbers, score_bounds
from fl_privacy.types import PropertyScores, Result, Samples

CHANCE = 0.5
"""What scores get that know nothing."""


def has_property(values: Tensor) -> bool | None:
    """Whether more than half of a batch has a property; ``values [n]``: 1 has, 0 has not.

    Values below 0 are unknown; None where they could decide, and where there is no sample.
    """
    n, sure, open_ = len(values), int((values > 0).sum()), int((values < 0).sum())
    if 2 * sure > n:
        return True
    return None if n == 0 or 2 * (sure + open_) > n else False


def any_has(answers: Iterable[bool | None]) -> bool | None:
    """Whether one of several batches has it; None where that is open."""
    known = set(answers)
    if True in known:
        return True
    return None if None in known or not known else False


def placements(scores: Numbers, has: Numbers) -> tuple[Numbers, Numbers]:
    """Of each positive the share of negatives that score less, of each negative that of positives
    that score more; ties count half.

    ``scores [n]``, ``has [n]`` 1 or 0. Their means are both the AUC.
    """
    positives, negatives = scores[has == 1], scores[has == 0]
    ranks = stats.rankdata(np.concatenate([positives, negatives]))
    m, n = len(positives), len(negatives)
    above = (ranks[:m] - stats.rankdata(positives)) / n
    below = 1 - (ranks[m:] - stats.rankdata(negatives)) / m
    return above, below


def auc_interval(
    scores: Sequence[float],
    has: Sequence[bool | None],
    clients: Sequence[Hashable] | None = None,
) -> Interval:
    """The AUC with its 95 % interval, over all scores whose truth is known (``n`` of them).

    ``clients`` says whose batches they are: clients are taken as independent, the batches of one
    are not. Of one client alone its batches are all there is, and the interval is over those: it
    says nothing about other clients. Without ``clients`` each batch is of another.

    Wilson's interval for as many trials as would vary as much: by `clustered_variance`, which is
    too small near 1, and so is never taken for less than that of two exponential distributions
    (`exponential_variance`; of as many scores as there are clients, where all pairs are told
    apart and nothing varies). Student's t stands for the normal. NaN without a batch of each
    kind; no interval with batches of one kind from a single client of several, or a single batch.
    """
    (values,), known = _known((scores,), has, clients)
    m, n = known.counts
    if not m or not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    above, below = placements(values, known.truth)
    area = float(above.mean())
    fewest = min(known.independent)
    if fewest < 2:
        return Interval(area, math.nan, math.nan, m + n)
    if 0 < area < 1:
        share = exponential_variance(area, m, n)
        share = max(share, known.variance(above, below) / (area * (1 - area)))
    else:
        share = exponential_variance(area, *known.independent)
    squeeze = NormalDist().inv_cdf((1 + LEVEL) / 2) / quantile(fewest)
    return Interval(area, *score_bounds(area, squeeze**2 / share), m + n)


def clustered_variance(
    above: Numbers, below: Numbers, of_above: np.ndarray, of_below: np.ndarray
) -> float:
    """Squared standard error of the mean of `placements`, whose clients are independent.

    ``of_above``, ``of_below`` number the client of each positive and negative. Obuchowski's
    ``S10 / m + S01 / n + 2 S11 / (m n)``, from sums over clients; with one batch a client it is
    that of DeLong et al., and never taken for less: few clients may look alike by chance.
    """
    _, codes = np.unique(np.concatenate([of_above, of_below]), return_inverse=True)
    clients = int(codes.max()) + 1
    sums = [
        np.bincount(own, weights=values - values.mean(), minlength=clients) / len(values)
        for values, own in ((above, codes[: len(above)]), (below, codes[len(above) :]))
    ]
    counts = [len(np.unique(own)) for own in (of_above, of_below)]
    pairs = list(zip(sums, counts, strict=True))
    own = sum(float(total @ total) * count / (count - 1) for total, count in pairs)
    shared = 2 * float(sums[0] @ sums[1]) * clients / (clients - 1)
    return max(own + shared, delong_variance(above, below))


def delong_variance(above: Numbers, below: Numbers) -> float:
    """Squared standard error of the mean of `placements`, each of another client."""
    return float(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))


def exponential_variance(area: float, m: int, n: int) -> float:
    """Squared standard error of an AUC of exponential distributions, as a share of a trial's.

    A trial's is ``area (1 - area)``; ``m`` and ``n`` scores of each kind. Hanley and McNeil,
    *Radiology* 143, 1982, with the numbers of Newcombe's method 5, *Statistics in Medicine* 25,
    2006.
    """
    most = (m + n) / 2 - 1
    return (1 + most * ((1 - area) / (2 - area) + area / (1 + area))) / (m * n)


def quantile(fewest: int) -> float:
    """Student's t for 95 % where the rarer kind is of ``fewest`` independent ones."""
    return float(stats.t.ppf((1 + LEVEL) / 2, fewest - 1))


def auc_difference(
    scores: Sequence[float],
    others: Sequence[float],
    has: Sequence[bool | None],
    clients: Sequence[Hashable] | None = None,
) -> Interval:
    """The AUC of ``scores`` minus that of ``others`` on the same batches; see `auc_above_mean`."""
    return auc_above_mean(scores, (others,), has, clients)


def auc_above_mean(
    scores: Sequence[float],
    several: Sequence[Sequence[float]],
    has: Sequence[bool | None],
    clients: Sequence[Hashable] | None = None,
) -> Interval:
    """The AUC of ``scores`` minus the mean AUC of ``several`` others on the same batches.

    With its 95 % interval over batches, the others being given: Student's t with the
    `clustered_variance` of the difference, within [-1, 1]; NaN as in `auc_interval`.
    """
    values, known = _known((scores, *several), has, clients)
    m, n = known.counts
    if not m or not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    placed = [placements(one, known.truth) for one in values]
    above, below = (mine - np.mean(theirs, axis=0) for mine, *theirs in zip(*placed, strict=True))
    gain = float(above.mean())
    fewest = min(known.independent)
    if fewest < 2:
        return Interval(gain, math.nan, math.nan, m + n)
    half = quantile(fewest) * math.sqrt(known.variance(above, below))
    return Interval(gain, max(-1.0, gain - half), min(1.0, gain + half), m + n)


@dataclass(frozen=True)
class _Known:
    """Batches whose truth is known: ``truth [n]`` 1 or 0, ``clients [n]`` numbers whose each is."""

    truth: Numbers
    clients: np.ndarray

    @property
    def counts(self) -> tuple[int, int]:
        """How many batches have the property, and how many have not."""
        return int((self.truth == 1).sum()), int((self.truth == 0).sum())

    @property
    def of_kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """Whose the batches are that have it, and those that have not."""
        return self.clients[self.truth == 1], self.clients[self.truth == 0]

    @property
    def of_one(self) -> bool:
        """Whether all are of one client."""
        return len(np.unique(self.clients)) == 1

    @property
    def independent(self) -> tuple[int, int]:
        """How many clients have batches of each kind; of one client alone, how many batches."""
        if self.of_one:
            return self.counts
        having, lacking = (len(np.unique(own)) for own in self.of_kinds)
        return having, lacking

    def variance(self, above: Numbers, below: Numbers) -> float:
        """That of the mean of `placements`, or of differences of them."""
        if self.of_one:
            return delong_variance(above, below)
        return clustered_variance(above, below, *self.of_kinds)


def _known(
    scores: Sequence[Sequence[float]],
    has: Sequence[bool | None],
    clients: Sequence[Hashable] | None,
) -> tuple[list[Numbers], _Known]:
    """Of ``k`` scores of each of n batches those where all are numbers and the truth is known."""
    values = np.asarray(scores, dtype=np.float64)
    truth = np.asarray([math.nan if h is None else float(h) for h in has], dtype=np.float64)
    kept = np.isfinite(values).all(axis=0) & np.isfinite(truth)
    numbers: dict[Hashable, int] = {}
    whose = range(len(truth)) if clients is None else clients
    codes = np.asarray([numbers.setdefault(c, len(numbers)) for c in whose], dtype=np.intp)
    return [row[kept] for row in values], _Known(truth[kept], codes[kept])


class AUC(Component):
    """Chance that a batch with the property is scored above one without it; 0.5 is no knowledge.

    Of a whole set of results, on the scores of the whole update or of one ``layer``. A batch has
    the property if more than half of its samples do (`has_property`).
    """

    layer: Annotated[str, Field(description="on this layer alone; empty: the whole update")] = ""

    unit: ClassVar[str] = "share of pairs"
    higher_is_leakier: ClassVar[bool] = True
    set_level: ClassVar[bool] = True
    kinds: ClassVar[tuple[type, ...]] = (PropertyScores,)

    def part(self, result: Result) -> Tensor:
        """The scores ``[exchanges]`` that a result brings to the set.

        Raises:
            TypeError: it has none.
        """
        if not isinstance(result, PropertyScores):
            raise TypeError(f"expected property scores, got {type(result).__name__}")
        if not self.layer:
            return result.scores
        return result.by_layer.get(self.layer, torch.full_like(result.scores, math.nan))

    def score(self, results: Sequence[Result], truths: Sequence[Samples]) -> Tensor:
        """The AUC ``[1]`` float64; ``truths`` holds one batch for each score, in order.

        Raises:
            ValueError: another number of truths.
        """
        scores = [float(s) for result in results for s in self.part(result)]
        names = [
            result.property
            for result in results
            if isinstance(result, PropertyScores)
            for _ in result.scores
        ]
        has = [truth_of(name, truth) for name, truth in zip(names, truths, strict=True)]
        return torch.tensor([auc_interval(scores, has).mean], dtype=torch.float64)


def truth_of(name: str, truth: Samples) -> bool | None:
    """Whether a batch has the property ``name``; None where its samples do not say."""
    values = truth.properties.get(name)
    return None if values is None else has_property(values)

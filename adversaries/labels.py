"""Which labels a batch held, read off the gradient of the classifier.

With the mean cross-entropy over ``n`` samples the gradient of the last bias is
``mean_i softmax(z_i) - counts / n``; each row of the last weight is that factor times
the sample's representation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adversaries.reference import Reference, reference
from fl_privacy.hooks import hooked
from fl_privacy.types import Samples, Task, Tensors

RIDGE = 0.1
"""Penalty of both regressions, over the mean square of a feature; chosen on training images."""
ROUNDS = 10


@dataclass(frozen=True)
class Evidence:
    """What the classifier's gradient tells, in float64.

    ``slopes [classes]`` are ``mean_i (softmax(z_i) - y_i)``: the bias gradient, or an
    estimate of it. ``rows [classes, features]`` is the weight gradient, None if withheld.
    """

    slopes: Tensor
    rows: Tensor | None


def classifier(model: nn.Module, task: Task) -> str | None:
    """Name of the linear layer whose output is the network's, None if there is none.

    Found by a probe, since a network may hold heads that it does not use. Where something
    acts behind the last linear layer with one row a class, that layer is taken.
    """
    outputs: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _arguments, output: outputs.update({name: output})

    hooks = [
        m.register_forward_hook(listen(name))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == task.classes
    ]
    with hooked(hooks), torch.no_grad():
        final = model(torch.zeros(2, *task.input_shape))
    ends = [name for name, output in outputs.items() if torch.equal(output, final)]
    return next(iter([*ends, *reversed(outputs)]), None)


def infer_labels(
    gradient: Tensors,
    model: nn.Module,
    state: Tensors,
    task: Task,
    images: int,
    auxiliary: Samples | None = None,
    *,
    same: str | None = None,
) -> Tensor:
    """Labels ``[images]`` of the batch behind ``gradient``, in ascending order.

    One sample and one step: `single_label`, exact. More: `count_labels` on `mean_outputs`, for
    which the network with ``state`` (which ``same`` may name, see `reference`) is run on
    auxiliary data, or on noise without. Without any evidence the classes are taken in turn,
    which is a guess. A tensor that is zero everywhere, as a client leaves what it
    withholds, is none.

    Not always exact for several samples (docs/reproduction.md): of clients with 2 of 10
    classes all counts of up to 8 images are right on untrained networks, and 94 % at 16 on
    lenet-zhu. Without the bias the same there; on mlp, whose representations vary in
    length, 84 / 59 / 34 % at 8 / 16 / 32 images, 100 / 97 / 94 % with auxiliary data
    (n = 32). Of several local steps ``gradient`` is the mean and ``state`` the middle of
    the way; the more the network learns on it, the worse the counts.
    """
    head = classifier(model, task)
    weight, bias = (f"{head}.{own}".lstrip(".") for own in ("weight", "bias"))
    rows, slopes = (
        gradient[own].double() if own in gradient and gradient[own].any() else None
        for own in (weight, bias)
    )
    if head is None or (rows is None and slopes is None):
        return (torch.arange(images) % task.classes).sort().values
    if images == 1 and (slopes is not None or task.classes > 2):
        return single_label(slopes, rows)
    known = reference(model, state, task, head, auxiliary, same=same)
    if slopes is None:
        assert rows is not None
        slopes = rows @ unit_functional(known.representations)
    evidence = Evidence(slopes, rows)
    return count_labels(slopes, mean_outputs(evidence, known, images), images)


def single_label(slopes: Tensor | None, rows: Tensor | None) -> Tensor:
    """The label of a single sample, exact; shape ``[1]``.

    ``softmax(z)_c - [c = y]`` is negative at ``c = y`` alone (Zhao et al., "iDLG", 2020,
    section 3.1), and as these numbers add up to zero it is the largest there: with more
    than two classes the longest row of the weight gradient tells the label whatever the
    sign of the representation, which the paper takes to be positive.
    """
    if slopes is not None:
        return slopes.argmin(dim=0, keepdim=True)
    assert rows is not None
    return rows.square().sum(1).argmax(dim=0, keepdim=True)


def unit_functional(representations: Tensor) -> Tensor:
    """``v [features]`` with ``representations [n, features] @ v`` close to one everywhere.

    Rows of the weight gradient times ``v`` then stand in for a bias gradient that is absent
    or withheld. Ridge regression in its dual form. (Wainakh et al., "User-Level Label
    Leakage", PoPETs 2022, scale the row sums by one estimated factor, which is this with
    equal entries.)
    """
    gram = representations @ representations.T
    ridge = RIDGE * gram.trace() / representations.shape[1]
    ones = gram.new_ones(len(gram))
    found: Tensor = representations.T @ torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype), ones
    )
    return found


def mean_outputs(evidence: Evidence, known: Reference, images: int) -> Tensor:
    """Estimate of the batch's mean softmax output ``[classes]``.

    The references' logits are moved to the batch's mean representation, which the rows
    give away (proposition 3.1 of Geiping et al., NeurIPS 2020, for one image). A class
    without samples shows its mean output, ``slopes_c``, and how it varies with the logits,
    ``rows_c``; those of the other classes are regressed on them over the references, as
    control variates are. Which classes have samples follows from the estimate, and is
    settled by repeating.
    """
    slopes, logits, moments = evidence.slopes, known.logits, None
    if evidence.rows is not None:
        center = slopes @ evidence.rows / slopes.square().sum().clamp(min=1e-300)
        middle = center @ known.weight.T
        logits = logits - logits.mean(0) + middle + known.bias
        moments = evidence.rows @ known.weight.T - slopes[:, None] * middle
    outputs = logits.softmax(1)
    estimate, settled = outputs.mean(0), torch.ones_like(slopes, dtype=torch.bool)
    for _ in range(ROUNDS):
        present = (estimate - slopes) * images > 0.5
        if not present.any():
            present = slopes <= slopes.min()
        if present.equal(settled):
            break
        settled, estimate = present, regressed(outputs, logits, slopes, moments, present)
    return estimate


def regressed(
    outputs: Tensor, logits: Tensor, slopes: Tensor, moments: Tensor | None, present: Tensor
) -> Tensor:
    """Mean outputs ``[classes]``, given those of the classes that are not ``present``."""
    absent = ~present
    features, seen = outputs[:, absent], slopes[absent]
    if moments is not None:
        varied = features[:, :, None] * (logits - logits.mean(0))[:, None]
        features = torch.cat([features, varied.flatten(1)], 1)
        seen = torch.cat([seen, moments[absent].flatten()])
    scale = features.std(0) + 1e-12
    standard, shift = (features - features.mean(0)) / scale, (seen - features.mean(0)) / scale
    gram = standard.T @ standard / len(standard)
    gram = gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    targets = outputs[:, present]
    slope = torch.linalg.solve(gram, standard.T @ (targets - targets.mean(0)) / len(standard))
    estimate = slopes.clone()
    estimate[present] = (targets.mean(0) + shift @ slope).clamp(min=1e-6)
    estimate[present] *= (1 - slopes[absent].sum()).clamp(min=1e-6) / estimate[present].sum()
    return estimate


def count_labels(slopes: Tensor, outputs: Tensor, images: int) -> Tensor:
    """The labels of ``images`` samples, repeated classes included; shape ``[images]``.

    ``counts = images * (outputs - slopes)`` with ``outputs [classes]`` standing for the
    mean softmax output, scaled and rounded by largest remainder so that they add up.
    """
    counts = (outputs - slopes).clamp(min=0)
    counts = counts if counts.sum() > 0 else outputs  # no class stands out
    counts = counts * (images / counts.sum())
    whole = counts.floor()
    missing = images - int(whole.sum())
    whole[(counts - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return torch.repeat_interleave(torch.arange(len(whole)), whole.long())

"""Which labels a batch held, read off the gradient of the classifier.

With the mean cross-entropy over ``n`` samples the gradient of the last bias is
``mean_i softmax(z_i) - counts / n``; each row of the last weight is that factor times
the sample's representation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.types import Task, Tensors


def classifier(model: nn.Module, classes: int) -> tuple[str, str | None] | None:
    """Names of the weight and bias of the last linear layer with one row a class."""
    heads = [
        (f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".") if m.bias is not None else None)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == classes
    ]
    return heads[-1] if heads else None


def class_evidence(gradient: Tensors, model: nn.Module, task: Task) -> Tensor | None:
    """One number a class, the smaller the more present: bias gradient, else weight row sums.

    Row sums carry the sign of the bias gradient when the representation is not
    negative (after ReLU or sigmoid). None when the layer is withheld or unknown.
    """
    head = classifier(model, task.classes)
    if head is None:
        return None
    weight, bias = head
    if bias is not None and bias in gradient:
        return gradient[bias].double()
    return gradient[weight].double().sum(1) if weight in gradient else None


def idlg_label(evidence: Tensor) -> Tensor:
    """The label of a single sample: the only class whose logit gradient is negative.

    ``softmax(z)_c - [c = y]`` is negative at ``c = y`` alone (Zhao et al., "iDLG",
    2020, section 3.1), so this is exact for one sample. Shape ``[1]``.
    """
    return evidence.argmin().view(1)


def count_labels(evidence: Tensor, prior: Tensor, images: int) -> Tensor:
    """The labels of ``images`` samples, repeated classes included; shape ``[images]``.

    ``counts = images * (prior - evidence)`` with ``prior [classes]`` standing for the
    mean softmax output, scaled and rounded by largest remainder so that they add up.
    """
    counts = (prior - evidence).clamp(min=0)
    counts = counts if counts.sum() > 0 else prior  # no class stands out
    counts = counts * (images / counts.sum())
    whole = counts.floor()
    missing = images - int(whole.sum())
    whole[(counts - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return torch.repeat_interleave(torch.arange(len(whole)), whole.long())


def infer_labels(
    gradient: Tensors, model: nn.Module, state: Tensors, task: Task, images: int
) -> Tensor:
    """Labels ``[images]`` of the batch behind ``gradient``, in ascending order.

    One sample: `idlg_label`. More: `count_labels`, which needs the bias gradient; the
    prior is the network's mean output on normalized noise. Without any evidence the
    classes are taken in turn, which is a guess.
    """
    evidence = class_evidence(gradient, model, task)
    if evidence is None:
        return (torch.arange(images) % task.classes).sort().values
    if images == 1:
        return idlg_label(evidence)
    noise = torch.randn(64, *task.input_shape, generator=torch.Generator().manual_seed(0))
    known = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        outputs = functional_call(model, {n: t for n, t in state.items() if n in known}, (noise,))
    return count_labels(evidence, outputs.double().softmax(1).mean(0), images)

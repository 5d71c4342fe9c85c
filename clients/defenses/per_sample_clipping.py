"""Per-sample gradient clipping: the first half of DP-SGD, without its noise.

Abadi et al.: Deep Learning with Differential Privacy, CCS 2016, algorithm 1,
https://arxiv.org/abs/1607.00133. Clipping alone gives no guarantee: one sample's gradient
keeps its direction, and at batch size 1 gradient inversion sees just that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fl_privacy.component import Component
from fl_privacy.types import PositiveFloat, Stats, Step, Tensors


class PerSampleClipping(Component):
    """Scales each sample's gradient down to L2 norm ``max_norm`` over all parameters.

    The result is the sum of the clipped gradients over ``Step.expected_batch_size``. One that
    is not finite, or too long to be measured, becomes zero: otherwise a server could send
    parameters that make a certain sample, and no other, spoil the whole sum.
    """

    sampling: ClassVar[Literal["shuffle", "poisson"]] = "shuffle"

    max_norm: PositiveFloat

    def defend_gradient(self, step: Step, *, generator: Generator) -> tuple[Tensors, Stats]:
        """The averaged clipped gradient; ``clipped_share`` and ``mean_norm`` of the samples.

        Gradients that became zero count as clipped, with norm 0. Draws nothing. Twice
        differentiable where no norm equals ``max_norm``.

        Raises:
            ValueError: the model has batch norm in train mode.
        """
        gradients = per_sample_gradients(step)
        norms = torch.stack([value.flatten(1).square().sum(1) for value in gradients.values()]).sum(
            0
        )
        finite = norms.isfinite()
        norms = norms.where(finite, 0).clamp_min(torch.finfo(norms.dtype).tiny).sqrt()
        factors = (self.max_norm / norms).clamp(max=1.0)
        clipped = {
            name: torch.einsum("n,n...->...", factors, _kept(value, finite))
            / step.expected_batch_size
            for name, value in gradients.items()
        }
        samples, found = max(len(step.labels), 1), norms.detach()
        return clipped, {
            "clipped_share": (~finite | (found > self.max_norm)).to(norms).sum() / samples,
            "mean_norm": found.sum() / samples,
        }


def _kept(values: Tensor, samples: Tensor) -> Tensor:
    """``values [n, ...]`` with zeros, whatever stood there, for all but the chosen samples."""
    return torch.where(samples.view(-1, *(1,) * (values.ndim - 1)), values, 0)


def per_sample_gradients(step: Step) -> dict[str, Tensor]:
    """The gradient of each sample's loss, ``[n, *parameter.shape]`` a parameter; n may be 0.

    Dropout in train mode draws for each sample by itself, from PyTorch's global state.

    Raises:
        ValueError: the model has batch norm in train mode, where a sample's gradient depends
            on its batch and is undefined.
    """
    mixing = batch_norm_in_train_mode(step.model)
    if mixing:
        raise ValueError(
            f"per-sample gradients do not exist with batch norm in train mode: "
            f"{', '.join(mixing)}; set batch-norm to eval, or choose a model with GroupNorm in its "
            f"place (opacus.validators.ModuleValidator.fix puts it there)"
        )
    if not len(step.labels):
        return {name: value.new_zeros(0, *value.shape) for name, value in step.parameters.items()}

    def loss(parameters: Tensors, sample: Tensor, label: Tensor) -> Tensor:
        state = {**parameters, **step.buffers}
        outputs = functional_call(step.model, state, (sample.unsqueeze(0),))
        return step.loss(outputs, label.unsqueeze(0)).sum()

    gradients: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(
        dict(step.parameters), step.inputs, step.labels
    )
    return gradients


def batch_norm_in_train_mode(model: nn.Module) -> Sequence[str]:
    """Names of the batch-norm layers that would use the batch's own statistics."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]

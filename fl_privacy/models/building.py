"""What every network needs: a private seed, the shape of an image, the width of its features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn

from fl_privacy.types import Task


@contextmanager
def initialization(seed: int) -> Iterator[None]:
    """Layers made inside draw their weights from ``seed``; the global state comes back after.

    Only the CPU's state is touched, so build networks on the CPU and move them afterwards.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


def image_shape(task: Task, *, least: int) -> tuple[int, int, int]:
    """Channels, height and width of the task's inputs.

    Raises:
        ValueError: the inputs are no images, or a side is shorter than ``least``.
    """
    if len(task.input_shape) != 3 or min(task.input_shape[1:]) < least:
        raise ValueError(
            f"expected images [channels, height, width] with sides of at least {least}, "
            f"got input_shape {task.input_shape}; choose another model, such as mlp"
        )
    channels, height, width = task.input_shape
    return channels, height, width


def output_features(body: nn.Module, task: Task) -> int:
    """Number of features ``body`` makes of one input.

    Only shapes are followed, on a copy on PyTorch's meta device: ``body`` stays as it is.
    """
    shadow = deepcopy(body).to("meta").eval()
    return math.prod(shadow(torch.empty(1, *task.input_shape, device="meta")).shape)


def classified(features: nn.Sequential, task: Task) -> nn.Sequential:
    """``features``, flattened, with a dense ``classifier`` of as many outputs as classes."""
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", nn.Linear(output_features(features, task), task.classes))
    return model


def image_network(
    task: Task, channels: tuple[int, ...], *, pools: int, dense: tuple[int, ...], padding: int
) -> nn.Sequential:
    """3x3 convolutions ``conv1``, ..., then `dense_layers` of widths ``dense`` and the classes.

    ReLU follows each convolution, and a max-pool of 2 each of the last ``pools``.

    Raises:
        ValueError: the task's inputs are no images, or too small for a pixel to be left.
    """
    pooled = [i > len(channels) - pools for i in range(1, len(channels) + 1)]
    least = 1
    for halved in reversed(pooled):
        least = (2 if halved else 1) * least + 2 * (1 - padding)
    width, _, _ = image_shape(task, least=least)
    model = nn.Sequential()
    for i, (out, halved) in enumerate(zip(channels, pooled, strict=True), start=1):
        model.add_module(f"conv{i}", nn.Conv2d(width, out, kernel_size=3, padding=padding))
        model.add_module(f"conv{i}_relu", nn.ReLU())
        if halved:
            model.add_module(f"pool{i}", nn.MaxPool2d(2))
        width = out
    model.add_module("flatten", nn.Flatten())
    return dense_layers(model, output_features(model, task), (*dense, task.classes))


def dense_layers(model: nn.Sequential, width: int, widths: tuple[int, ...]) -> nn.Sequential:
    """``model`` with dense layers ``fc1``, ``fc2``, ... of ``widths``, ReLU in between."""
    for i, out in enumerate(widths, start=1):
        model.add_module(f"fc{i}", nn.Linear(width, out))
        if i < len(widths):
            model.add_module(f"fc{i}_relu", nn.ReLU())
        width = out
    return model

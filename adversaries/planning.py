"""How many images fit into one batch, and how many lanes that batch has."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adversaries.matching import chunks, images_of
from adversaries.tokens import token_table
from fl_privacy.processes import memory_shares
from fl_privacy.types import Observation, Task

MAX_WIDTH = 128
"""More images than this gain nothing on a CPU (`make bench`); on CUDA it bounds nothing."""


def plan_width(
    observations: Sequence[Observation],
    *,
    restarts: int,
    device: torch.device,
    itemsize: int = 4,
) -> int:
    """How many images one batch can hold: bounded by memory, by the work, by `MAX_WIDTH`.

    The last is for CPUs; on CUDA memory and work alone decide.

    An image is estimated at ten times its activations (forward, backward and their
    derivatives) in each local step, plus six times the gradient of a target that holds it
    alone, of ``itemsize`` bytes a number; half of the free memory is used, or of a process's
    share of it (`fl_privacy.processes.memory_shares`). The work is that of the largest group
    of targets that can share a batch, each of the size that is typical (the median), so that
    no client's claim makes the batches of others small or wide.
    """
    first = observations[0]
    training = first.local_training
    assert training is not None
    if token_table(first.model(), first.task) is not None:
        return 1  # the attack refuses it in words
    passes = training.epochs if training.algorithm == "fedavg" else 1
    weights = sum(p.numel() for p in first.model().parameters())
    elements = passes * (10 * activations(first.model(), first.task) + 6 * weights)
    elements *= len(first.exchanges)
    sizes = [images_of(observation) for observation in observations]
    groups = chunks(observations, sum(sizes))
    work = max(len(members) for members in groups) * statistics.median_low(sizes)
    share = free_memory(device) // (2 * memory_shares())
    by_memory = share // (itemsize * elements * restarts)
    worthwhile = work if device.type == "cuda" else min(work, MAX_WIDTH)
    return max(1, min(worthwhile, by_memory))


def activations(model: nn.Module, task: Task) -> int:
    """Number of values that the modules put out for one input."""
    total = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *task.input_shape))
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def lane_count(width: int, restarts: int, device: torch.device) -> int:
    """Lanes of a batch: ``width * restarts``, on a CPU rounded up to fill every thread alike.

    Kernels that share the lanes out unevenly among threads give a lane bits that depend on
    its place; multiples of four a thread do not, nor do four lanes (tested).
    """
    lanes = width * restarts
    if device.type != "cpu" or lanes == 1:
        return lanes
    whole = 4 * torch.get_num_threads() if lanes > 4 else 4
    return -(-lanes // whole) * whole

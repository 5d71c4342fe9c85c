"""Sensitivity of all layers of AlexNet [Mo]: to the label beside a loop, to the input beside one.

*Label side*, eq. (2) to the letter: the loop takes one sample after the other, a backward pass to
all weights for each class, forms ``Z^T (p 1^T - I)`` of each layer and takes its norm. Printed are
the ratio of the times, and the largest relative difference of a sample's value at a layer from that
of the same loop in float64: of ours, and of the loop in float32.

*Input*: one pass of probes, which serves all layers, beside as many double backward passes of one
layer on the same samples, each ``d<g, u>/dx`` for a random u: with the graph of g made once and
kept, and, as a loop would have it, made anew each time.

Everything is measured in alternation in one process, and the ratios are of medians. Images are
random: what they show does not matter to the time. Run by `make bench`, or with options::

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_sensitivity.py --quick --processor-time
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversaries.layerwise.input_changes import linearized, probed_norms
from adversaries.layerwise.sample_gradients import Network, sent_network
from adversaries.layerwise.sensitivity_label import TITLES, LabelSensitivity
from fl_privacy import component
from fl_privacy.layers import weight_layers, weight_of
from fl_privacy.seeding import generator
from fl_privacy.types import Exchange, Samples, Task

CPU = torch.device("cpu")


def task_of(classes: int, side: int) -> Task:
    """Color images of ``side`` pixels."""
    return Task(input_shape=(3, side, side), classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3)


def network_of(name: str, task: Task) -> Network:
    """The untrained network as if it had been recorded."""
    model: nn.Module = component.create("models", name).build(task, seed=0)
    sent = {n: p.detach() for n, p in model.named_parameters()}
    exchange = Exchange(1, 1, "0", 1, "", "", sent, dict(model.named_buffers()), {}, {})
    return sent_network(lambda: model, task, exchange, weight_layers(model, task), CPU)


def pictures(n: int, task: Task) -> Samples:
    """Random images, labels in turn."""
    inputs = torch.rand(n, *task.input_shape, generator=generator(0, "bench"))
    return Samples(inputs, torch.arange(n) % task.classes)


def loop(network: Network, data: Samples) -> Tensor:
    """Eq. (2) by a pass for each sample and class: ``[n, layers]``."""
    weights = weights_of(network)
    rows = []
    for x, label in zip(data.inputs, data.labels, strict=True):
        logits = network.model(network.task.normalize(x)[None])[0]
        slopes = [torch.autograd.grad(z, weights, retain_graph=True) for z in logits]
        p = logits.detach().softmax(0)
        mixing = p[:, None].expand(-1, len(p)) - torch.eye(len(p), dtype=p.dtype)
        values = []
        for kind in zip(*slopes, strict=True):
            jacobian = torch.stack(kind).flatten(1).T @ mixing
            own = jacobian[:, label]
            values.append(jacobian.norm() / len(own) ** 0.5 / (own.max() - own.min()))
        rows.append(torch.stack(values))
    return torch.stack(rows)


def precise(network: Network, data: Samples) -> Tensor:
    """The loop in float64."""
    network.model.double()
    return loop(network, Samples(data.inputs.double(), data.labels))


def weights_of(network: Network) -> list[nn.Parameter]:
    """The weights of all layers, which may be differentiated."""
    weights = [network.model.get_parameter(weight_of(name)) for name in network.layers]
    for weight in weights:
        weight.requires_grad_()
    return weights


def graph_of(network: Network, data: Samples, layer: int) -> tuple[Tensor, Tensor]:
    """The gradient of a layer, with the graph to differentiate it, and the inputs."""
    inputs = data.inputs.clone().requires_grad_()
    weight = weights_of(network)[layer]
    logits = network.model(network.task.normalize(inputs))
    loss = F.cross_entropy(logits, data.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    return gradient, inputs


def double_backwards(
    network: Network, data: Samples, layer: int, *, number: int, keep: bool
) -> None:
    """``number`` double backward passes of one layer; ``keep``: its graph is made once."""
    gradient, inputs = graph_of(network, data, layer)
    for i in range(number):
        if i and not keep:
            gradient, inputs = graph_of(network, data, layer)
        torch.autograd.grad(gradient, inputs, torch.randn_like(gradient), retain_graph=True)


def medians(
    repeats: int, clock: Callable[[], float], calls: list[Callable[[], object]]
) -> list[float]:
    """Median times of ``calls``, taken in turn after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, own in zip(calls, times, strict=True):
            start = clock()
            call()
            if turn:
                own.append(clock() - start)
    return [statistics.median(own) for own in times]


def label_side(options: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Print the ratio of the loop's time to ours, and how far the values agree."""
    print("\nlabel side: ms a sample, times the loop is slower, largest relative errors")
    for classes in (10, 2):
        task = task_of(classes, options.side)
        ours, theirs = (network_of(options.network, task) for _ in range(2))
        data = pictures(options.samples, task)
        truth = precise(network_of(options.network, task), data)
        found: list[Tensor] = []
        looped: list[Tensor] = []
        for chunk in options.chunks:
            metric = LabelSensitivity(chunk=chunk)
            slow, fast = medians(
                options.repeats,
                clock,
                [
                    lambda: looped.append(loop(theirs, data)),  # noqa: B023
                    lambda: found.append(metric.at(ours, data)[TITLES["label"]]),  # noqa: B023
                ],
            )
            apart = [float(((f - truth).abs() / truth).max()) for f in (found[-1], looped[-1])]
            each = 1e3 / len(data)
            print(
                f"{classes:3d} classes, chunk {chunk:3d}: loop {slow * each:7.2f}, "
                f"ours {fast * each:6.2f}, {slow / fast:5.1f} times, errors: ours {apart[0]:.0e}, "
                f"loop {apart[1]:.0e}"
            )


def input_side(options: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Print what a pass for all layers costs beside that many double backward passes of one."""
    task = task_of(10, options.side)
    ours, theirs = (network_of(options.network, task) for _ in range(2))
    data = pictures(options.batch, task)
    local = linearized(ours, data.inputs, data.labels)
    norms, errors = probed_norms(local, options.probes, range(len(data)), 0)

    def one_pass() -> object:
        prepared = linearized(ours, data.inputs, data.labels)
        return probed_norms(prepared, options.probes, range(len(data)), 0)

    one = partial(double_backwards, theirs, data, number=options.probes)
    loops = [partial(one, i, keep=k) for k in (True, False) for i in range(len(ours.layers))]
    calls: list[Callable[[], object]] = [one_pass, *loops]
    once, *others = medians(options.repeats, clock, calls)
    each = 1e3 / options.probes / len(data)
    print(
        f"\ninput side: {options.probes} probes, {len(data)} samples at once, ms a probe and "
        f"sample\nall layers in one pass: {once * each:.3f}\none layer by double backward, and "
        f"the one pass over it: graph kept, graph made anew; error of a sample's norm"
    )
    count = len(ours.layers)
    for i, name in enumerate(ours.layers):
        kept, anew = others[i], others[count + i]
        error = float((errors / norms)[:, i].nanmean())
        print(
            f"{name:8s} {kept * each:.3f} {once / kept:5.2f}    {anew * each:.3f} "
            f"{once / anew:5.2f}    {100 * error:.1f} %"
        )
    print(
        f"all      {sum(others[:count]) * each:.3f} {once / sum(others[:count]):5.2f}    "
        f"{sum(others[count:]) * each:.3f} {once / sum(others[count:]):5.2f}"
    )


def main() -> None:
    """Print the versions, then both sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="alexnet-mo")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--samples", type=int, default=64, help="of the label side")
    parser.add_argument("--chunks", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--batch", type=int, default=16, help="samples at once of the input side")
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 samples, 8 probes, once")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a busy machine, with one thread"
    )
    options = parser.parse_args()
    if options.quick:
        options.samples, options.probes, options.repeats = 8, 8, 1
    clock = time.process_time if options.processor_time else time.perf_counter
    print(
        f"fl-privacy {component.VERSION}, torch {torch.__version__}, cpu "
        f"{torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}, "
        f"{options.network}, {options.side}x{options.side}x3"
    )
    label_side(options, clock)
    input_side(options, clock)


if __name__ == "__main__":
    main()

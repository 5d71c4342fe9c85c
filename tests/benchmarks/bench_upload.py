"""What defenses save in upload: bytes of one reply, dense and sparse, and what encoding takes.

Run ``python tests/benchmarks/bench_upload.py [--batch-size N]``. One client takes one step of
SGD on random 32x32 images (CIFAR-10's shape) and replies as our client does; sizes are those of
the arrays in the message. Every encoded reply is decoded and compared bit for bit.

The table is of the first round, where the network is as it was made. Soteria zeroes a part of
one layer's gradient: at most that layer's share of the reply can be saved, and with a mask for
each sample only what all masks of the batch have in common.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict

import torch
from flwr.app import ArrayRecord
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from clients.defending import defend_update
from clients.encoding import sparse_if_smaller
from clients.training import local_train
from fl_privacy.component import create, create_all
from fl_privacy.defenses import split_defenses
from fl_privacy.seeding import generator
from fl_privacy.sparse import ARRAY, decode
from fl_privacy.types import LocalTraining, Samples, Task

TASK = Task(input_shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
MODELS = ("lenet-zhu", "convnet64")
DEFENSES = (
    "",
    "soteria(rate=0.4, scores='sketch')",
    "soteria(rate=0.8, scores='sketch')",
    "gradient_compression(rate=0.5)",
    "gradient_compression(rate=0.9)",
    "gradient_compression(rate=0.99)",
    "withhold(layers=('classifier',))",
    "withhold(layers=('features',))",
)


def reply(model_name: str, spec: str, batch_size: int) -> tuple[ArrayRecord, ArrayRecord]:
    """What a client was sent, and what it returns after one defended step."""
    model = create("models", model_name).build(TASK, seed=0)
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    gradient_defense, update_defenses = split_defenses(create_all("defenses", spec))
    draws = generator(0, "images")
    images = torch.rand(batch_size, *TASK.input_shape, generator=draws)
    labels = torch.randint(TASK.classes, (batch_size,), generator=draws)
    result = local_train(
        model,
        TASK,
        Samples(images, labels),
        LocalTraining(lr=0.01, batch_size=batch_size),
        generator=generator(0, "batches"),
        gradient_defense=gradient_defense,
        defense_generator=generator(0, "gradient-defense"),
    )
    state, _ = defend_update(
        sent,
        result.state,
        update_defenses,
        names=[name for name, _ in model.named_parameters()],
        generator=generator(0, "update-defense"),
    )
    return ArrayRecord(OrderedDict(sent)), ArrayRecord(OrderedDict(state))


def row(model_name: str, spec: str, batch_size: int) -> list[str]:
    """One line of the table."""
    sent, dense = reply(model_name, spec, batch_size)
    start = time.perf_counter()
    encoded = sparse_if_smaller(sent, dense)
    middle = time.perf_counter()
    if list(encoded) == [ARRAY]:
        before = {name: array.numpy() for name, array in sent.items()}
        restored = decode(before, encoded[ARRAY].numpy().tobytes())
        assert all(restored[n].tobytes() == a.numpy().tobytes() for n, a in dense.items())
    end = time.perf_counter()
    full, small = (sum(len(a.data) for a in record.values()) for record in (dense, encoded))
    seconds = (middle - start, end - middle)
    times = [f"{1e3 * s:.1f}" for s in seconds]
    return [spec or "none", decimal(full), decimal(small), f"{full / small:.2f}", *times]


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=1, help="samples behind the update")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    for name in MODELS:
        table = Table("defense", "dense", "sparse", "ratio", "encode ms", "decode ms")
        table.title = f"{name}, one step on {arguments.batch_size} images"
        for spec in DEFENSES:
            table.add_row(*row(name, spec, arguments.batch_size))
        console.print(table)


if __name__ == "__main__":
    main()

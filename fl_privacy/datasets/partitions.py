"""How the clients share the training split; the same in every process for the same seed.

IID, pathological and Dirichlet are the partitioners of flwr-datasets, fed with the labels
alone in a seeded order; nothing is written to disk and no global generator is touched.
flwr-datasets is imported when a partition is drawn, since that takes more than a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.seeding import derive_seed, generator
from fl_privacy.types import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


class IID(Component):
    """Shuffle, then deal parts of equal size (they differ by one at most); disjoint, complete."""

    def indices(self, labels: Tensor, client: int, clients: int, *, seed: int) -> Tensor:
        """Sample indices ``[n]`` int64 of client ``client`` of ``clients``."""
        _check(len(labels), client, clients)
        from flwr_datasets.partitioner import IidPartitioner

        return _part(IidPartitioner(clients), labels, client, seed)


class Pathological(Component):
    """Each client has samples of exactly ``classes_per_client`` classes; disjoint.

    Li et al.: Federated Learning on Non-IID Data Silos, 2021, https://arxiv.org/abs/2102.02079.
    With ``first-deterministic``, the paper's way, client p has class p modulo the number of
    classes and random others. A class nobody has drawn stays unused.
    """

    classes_per_client: PositiveInt = 2
    assignment: Literal["first-deterministic", "random", "deterministic"] = "first-deterministic"

    def indices(self, labels: Tensor, client: int, clients: int, *, seed: int) -> Tensor:
        """Sample indices ``[n]`` int64 of client ``client`` of ``clients``.

        Raises:
            DatasetError: fewer classes than ``classes_per_client``, or a class with fewer
                samples than clients that need it.
        """
        _check(len(labels), client, clients)
        from flwr_datasets.partitioner import PathologicalPartitioner

        partitioner = PathologicalPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_classes_per_partition=self.classes_per_client,
            class_assignment_mode=self.assignment,
            seed=derive_seed(seed, "pathological"),
        )
        return _part(partitioner, labels, client, seed)


class Dirichlet(Component):
    """Each class is shared in proportions drawn from a Dirichlet of ``alpha``; disjoint, complete.

    Yurochkin et al.: Bayesian Nonparametric Federated Learning of Neural Networks, 2019,
    https://arxiv.org/abs/1905.12022. Small ``alpha`` makes clients unlike each other. The draw
    is repeated, ten times at most, until each client has ``min_samples``; ``balanced`` stops
    serving clients that have more than the average.
    """

    alpha: PositiveFloat = 0.5
    min_samples: Annotated[int, Field(ge=0)] = 10
    balanced: bool = False

    def indices(self, labels: Tensor, client: int, clients: int, *, seed: int) -> Tensor:
        """Sample indices ``[n]`` int64 of client ``client`` of ``clients``.

        Raises:
            DatasetError: ``min_samples`` was not reached.
        """
        _check(len(labels), client, clients)
        from flwr_datasets.partitioner import DirichletPartitioner

        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=self.alpha,
            min_partition_size=self.min_samples,
            self_balancing=self.balanced,
            seed=derive_seed(seed, "dirichlet"),
        )
        return _part(partitioner, labels, client, seed)


class Consecutive(Component):
    """Equal parts of the training split in its own order, whatever the seed; disjoint, complete.

    Sources of people keep a person's samples together (`fl_privacy.datasets.attributed`), so
    clients then have people of their own, except that two neighbors may share the one person
    whose samples the border cuts.
    """

    def indices(self, labels: Tensor, client: int, clients: int, *, seed: int) -> Tensor:
        """Sample indices ``[n]`` int64 of client ``client`` of ``clients``."""
        _check(len(labels), client, clients)
        return torch.arange(len(labels)).tensor_split(clients)[client]


class ClassesBySamples(Component):
    """Each client has ``samples`` images of each of ``classes`` random classes.

    The setup of Soteria (100 devices, 2 classes, 100 samples a class; Sun et al., CVPR 2021,
    https://arxiv.org/abs/2012.06043). Clients take consecutive pieces of a class's shuffled
    images, so they share none until more is asked of a class than it has: then later clients
    start over and **reuse images that others have**. No client has an image twice.
    """

    classes: PositiveInt = 2
    samples: PositiveInt = 100

    def indices(self, labels: Tensor, client: int, clients: int, *, seed: int) -> Tensor:
        """Sample indices ``[classes * samples]`` int64 of client ``client`` of ``clients``.

        Raises:
            DatasetError: too few classes, or a class with fewer than ``samples`` images.
        """
        _check(len(labels), client, clients)
        sizes = torch.bincount(labels)
        usable = int((sizes >= self.samples).sum())
        if usable < len(sizes) or self.classes > len(sizes):
            raise DatasetError(
                f"classes-by-samples: expected {self.classes} or more classes with "
                f"{self.samples} or more samples each, got classes of {sizes.tolist()}; "
                f"lower classes or samples"
            )
        chosen = [self._classes(i, len(sizes), seed) for i in range(client + 1)]
        pieces = []
        for label in chosen[client]:
            members = torch.nonzero(labels == label).flatten()
            order = torch.randperm(len(members), generator=generator(seed, "class", label))
            start = self.samples * sum(label in earlier for earlier in chosen[:client])
            pieces.append(members[order[(start + torch.arange(self.samples)) % len(members)]])
        return torch.cat(pieces)

    def _classes(self, client: int, classes: int, seed: int) -> list[int]:
        draw = torch.randperm(classes, generator=generator(seed, "classes", client))
        return draw[: self.classes].tolist()


def _check(n: int, client: int, clients: int) -> None:
    if not 0 <= client < clients:
        raise DatasetError(f"expected a client in 0..{clients - 1}, got {client}")
    if clients > n:
        raise DatasetError(f"{clients} clients cannot share {n} samples; use fewer clients")


def _part(partitioner: Partitioner, labels: Tensor, client: int, seed: int) -> Tensor:
    """Indices of one client: the partitioner sees the samples in a seeded random order."""
    from datasets import Dataset

    order = torch.randperm(len(labels), generator=generator(seed, "partition"))
    partitioner.dataset = Dataset.from_dict(
        {"label": labels[order].numpy(), "index": order.numpy()}
    )
    try:
        part = partitioner.load_partition(client)
    except ValueError as error:
        raise DatasetError(f"{type(partitioner).__name__}: {error}") from error
    return torch.tensor(part["index"][:], dtype=torch.int64)

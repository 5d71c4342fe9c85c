"""Partitions: disjoint, complete, seeded, with the class counts they promise."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_privacy.component import create
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.partitions import IID, ClassesBySamples, Dirichlet, Pathological
from fl_privacy.protocols import Partition

LABELS = torch.arange(10).repeat_interleave(120)
CLIENTS = 12
ALL = (IID(), Pathological(), Dirichlet(alpha=0.5), ClassesBySamples(classes=2, samples=20))


def shares(partition: Partition, seed: int = 0, clients: int = CLIENTS) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # flwr-datasets tells of unused classes
        return [partition.indices(LABELS, i, clients, seed=seed) for i in range(clients)]


@pytest.mark.parametrize("partition", ALL, ids=lambda p: type(p).__name__)
def test_a_share_depends_on_the_seed_alone(partition: Partition) -> None:
    first, again, other = shares(partition), shares(partition), shares(partition, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("partition", ALL, ids=lambda p: type(p).__name__)
def test_no_global_generator_is_touched(partition: Partition) -> None:
    def states() -> list[object]:
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002
        return [torch.get_rng_state().tolist(), random.getstate(), repr(legacy)]

    before = states()
    shares(partition, clients=3)
    assert states() == before


@pytest.mark.parametrize("partition", [IID(), Dirichlet(), Dirichlet(balanced=True)])
def test_complete_partitions_share_out_every_sample_once(partition: Partition) -> None:
    everything = torch.cat(shares(partition))
    assert torch.equal(everything.sort().values, torch.arange(len(LABELS)))


@pytest.mark.parametrize("partition", ALL, ids=lambda p: type(p).__name__)
def test_clients_have_nothing_in_common(partition: Partition) -> None:
    """Also classes-by-samples: no class is asked for more than its 120 samples here."""
    everything = torch.cat(shares(partition, clients=5))
    assert len(set(everything.tolist())) == len(everything)


def test_iid_deals_equal_parts_of_every_class() -> None:
    parts = shares(IID(), clients=7)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(set(LABELS[part].tolist())) == 10 for part in parts)


@pytest.mark.parametrize("mode", ["first-deterministic", "random", "deterministic"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_pathological_clients_have_exactly_so_many_classes(mode: str, classes: int) -> None:
    spec = f"pathological(classes_per_client={classes}, assignment={mode!r})"
    for part in shares(create("partitions", spec)):
        assert len(set(LABELS[part].tolist())) == classes


def test_small_alpha_makes_clients_unlike_each_other() -> None:
    """The largest share of one class: about 1/10 for large alpha, near 1 for small alpha."""

    def concentration(alpha: float) -> float:
        parts = shares(Dirichlet(alpha=alpha, min_samples=1), clients=5)
        tops = [torch.bincount(LABELS[part]).max() / len(part) for part in parts]
        return float(torch.stack(tops).mean())

    assert concentration(1000.0) < 0.13 < 0.25 < concentration(0.1)


def test_dirichlet_keeps_its_least_size_or_says_that_it_cannot() -> None:
    assert min(len(part) for part in shares(Dirichlet(min_samples=30))) >= 30
    with pytest.raises(DatasetError, match="max number of attempts"):
        shares(Dirichlet(min_samples=100))


def test_classes_by_samples_gives_what_its_name_says() -> None:
    for part in shares(ClassesBySamples(classes=3, samples=17), clients=40):
        counts = torch.bincount(LABELS[part], minlength=10)
        assert sorted(counts[counts > 0].tolist()) == [17, 17, 17]
        assert len(set(part.tolist())) == len(part)


def test_classes_by_samples_reuses_images_only_when_a_class_runs_short() -> None:
    """Forty clients ask for 40 * 2 * 100 images where there are 1,200."""
    parts = shares(ClassesBySamples(classes=2, samples=100), clients=40)
    for label in range(10):
        asked = torch.cat([part[LABELS[part] == label] for part in parts])
        uses = torch.bincount(asked, minlength=len(LABELS))[label == LABELS]
        assert int(uses.max() - uses.min()) <= 1
    assert all(len(set(part.tolist())) == 200 for part in parts)


@pytest.mark.parametrize("settings", [{"samples": 121}, {"classes": 11}])
def test_classes_by_samples_refuses_what_the_data_cannot_give(settings: dict[str, int]) -> None:
    with pytest.raises(DatasetError, match=r"classes of \[120, .*lower classes or samples"):
        ClassesBySamples(**settings).indices(LABELS, 0, 2, seed=0)


@pytest.mark.parametrize("partition", ALL, ids=lambda p: type(p).__name__)
def test_a_client_that_does_not_exist_is_refused(partition: Partition) -> None:
    with pytest.raises(DatasetError, match=r"client in 0\.\.2, got 3"):
        partition.indices(LABELS, 3, 3, seed=0)


def test_more_classes_than_there_are_is_refused() -> None:
    with pytest.raises(DatasetError, match="classes"):
        Pathological(classes_per_client=11).indices(LABELS, 0, 2, seed=0)


def test_more_clients_than_samples_is_refused() -> None:
    with pytest.raises(DatasetError, match="1201 clients cannot share 1200 samples"):
        IID().indices(LABELS, 0, 1201, seed=0)

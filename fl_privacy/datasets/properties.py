"""Attributes of people: main task, properties, how they are related, and who belongs where.

An attribute holds one value for each sample: 1 has it, 0 has not, -1 unknown. A property is an
attribute that samples carry beside their label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO, WARNING, getLogger
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fl_privacy.component import meant
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.seeding import generator
from fl_privacy.types import Samples

Group = Literal["clients", "auxiliary", "test"]

HAS, LACKS = 1, 0
"""Values of a property; any other is unknown."""

UNRELATED = 0.2
"""|phi| up to which a property counts as unrelated to the main task."""


class PropertyError(ValueError):
    """A property that cannot be inferred as asked; the message says what could."""


class Property(NamedTuple):
    """A property's name, and its value for each sample, ``[n]``."""

    name: str
    values: Tensor


def property_of(properties: Mapping[str, Tensor], name: str, where: str = "the data") -> Property:
    """The property ``name``, one of ``properties``; an empty name is the only one there is.

    ``where`` says in errors what holds them.

    Raises:
        PropertyError: no such property, or several without a name; lists those there are.
    """
    listed = ", ".join(sorted(properties))
    if not properties:
        raise PropertyError(
            f"no property in {where}: load some with the dataset's own setting, such as "
            f"npz(..., properties=('smiling_{{split}}',)), or name other data"
        )
    if not name and len(properties) > 1:
        raise PropertyError(
            f"several properties in {where}: expected property='...', one of {listed}"
        )
    name = name or next(iter(properties))
    if name not in properties:
        raise PropertyError(
            f"no property {name!r} in {where}{meant(name, properties)}; expected one of {listed}"
        )
    return Property(name, properties[name])


def telling_property(
    properties: Mapping[str, Tensor], name: str, where: str = "the data"
) -> Property:
    """`property_of`, with samples that have it and samples that have not.

    Raises:
        PropertyError: as there, or all or none have it.
    """
    found = property_of(properties, name, where)
    having, without = (int((found.values == kind).sum()) for kind in (HAS, LACKS))
    if not having or not without:
        raise PropertyError(
            f"expected samples with the property {found.name!r} and samples without in {where}, "
            f"got {having} with, {without} without and {len(found.values) - having - without} "
            f"unknown; choose another property, or data that holds both"
        )
    return found


@dataclass(frozen=True, eq=False)
class AttributeTable:
    """Samples of people: ``inputs [n, *input_shape]``, ``person [n]`` int64, ``attributes [n]``.

    uint8 inputs are pixels of 0 to 255.
    """

    inputs: Tensor
    person: Tensor
    attributes: Mapping[str, Tensor]

    def attribute(self, name: str) -> Tensor:
        """Values ``[n]`` int64 of one attribute.

        Raises:
            DatasetError: no such attribute; the message lists those that exist.
        """
        if name not in self.attributes:
            raise DatasetError(
                f"no attribute {name!r}{meant(name, self.attributes)}; "
                f"attributes: {', '.join(sorted(self.attributes))}"
            )
        return self.attributes[name].to(torch.int64)


class Phi(NamedTuple):
    """How closely labels and a property go together, over ``n`` samples that have both."""

    value: float
    n: int

    @property
    def related(self) -> bool:
        """Whether it is more than what counts as unrelated."""
        return abs(self.value) > UNRELATED

    def __str__(self) -> str:
        """``+0.310 (n = 400), above 0.2: not unrelated``."""
        warning = f", above {UNRELATED}: not unrelated" if self.related else ""
        return f"{self.value:+.3f} (n = {self.n}){warning}"


class Secret(NamedTuple):
    """A `Property` that the labels do not give away, and how closely it goes with them."""

    name: str
    values: Tensor
    relation: Phi


def main_labels(table: AttributeTable, main_task: str | tuple[str, ...]) -> Tensor:
    """Labels ``[n]`` int64 of the main task, -1 unknown.

    One name gives two classes. Several names give one class each: a sample's class is the only
    attribute that it has; with none, with more than one, or with an unknown one it is unknown.
    (The code of Melis et al. takes the highest of several scores instead.)
    """
    if isinstance(main_task, str):
        return table.attribute(main_task)
    values = torch.stack([table.attribute(name) for name in main_task], dim=1)
    known = (values >= 0).all(1) & (values.clamp_min(0).sum(1) == 1)
    return torch.where(known, values.argmax(1), -1)


def phi(labels: Tensor, values: Tensor) -> Phi:
    """Phi coefficient of the labels ``[n]`` of two classes and a property ``[n]``.

    The Pearson correlation of two binary variables (Yule: On the Methods of Measuring
    Association between Two Attributes, 1912). For more than two classes Cramer's V, which is
    |phi| for two and has no sign. Samples with an unknown (negative) value do not count; nan
    where labels or property have one value only.
    """
    from scipy.stats.contingency import association

    both = (labels >= 0) & (values >= 0)
    n = int(both.sum())
    cells = 2 * labels[both] + values[both]
    counts = torch.bincount(cells, minlength=4)
    table = torch.nn.functional.pad(counts, (0, len(counts) % 2)).view(-1, 2)
    table = table[table.sum(1) > 0]
    if len(table) < 2 or not bool(table.sum(0).all()):
        return Phi(float("nan"), n)
    value = float(association(table.numpy(), method="cramer"))
    if len(table) == 2 and table[0, 0] * table[1, 1] < table[0, 1] * table[1, 0]:
        value = -value
    return Phi(value, n)


def check_property(name: str, labels: Tensor, values: Tensor) -> Phi:
    """Phi of a property, if there is a secret in it apart from the main task.

    Raises:
        DatasetError: it has one value only, or the main task's labels give it away, of which one
            at least is seen twice.
    """
    relation = phi(labels, values)
    both = (labels >= 0) & (values >= 0)
    pairs = set(zip(labels[both].tolist(), values[both].tolist(), strict=True))
    held = {value for _, value in pairs}
    if len(held) < 2:
        found = f"is {held.pop()} for all" if held else "is unknown for all"
        raise DatasetError(
            f"property {name!r} {found} samples whose main task is known; choose another property"
        )
    if len(pairs) == len({label for label, _ in pairs}) < relation.n:
        raise DatasetError(
            f"property {name!r} is the main task, or its complement (|phi| = "
            f"{abs(relation.value):.3g}, n = {relation.n}): the labels give it away; choose a "
            f"property that is not the task"
        )
    return relation


def secret_property(samples: Samples, name: str, where: str = "the data") -> Secret:
    """`telling_property` of samples, in which there is a secret apart from their labels.

    Raises:
        PropertyError: as there, or the labels give it away.
    """
    found = telling_property(samples.properties, name, where)
    try:
        relation = check_property(found.name, samples.labels, found.values)
    except DatasetError as error:
        raise PropertyError(f"{error}; seen in {where}") from None
    return Secret(*found, relation)


def tell_relation(name: str, relation: Phi, over: str = "") -> None:
    """Log how closely a property and the main task go together, a warning where they do.

    ``over`` says on which samples, such as `` over all``.
    """
    level = WARNING if relation.related else INFO
    getLogger("flwr").log(level, "Property %s: phi to the main task%s %s", name, over, relation)


def split_people(
    person: Tensor, shares: tuple[float, float, float], seed: int
) -> Mapping[Group, Tensor]:
    """Sample indices of three disjoint groups of people, drawn from ``seed`` alone.

    ``person [n]`` tells who is on each sample; ``shares`` (clients, auxiliary, test) are shares
    of people, not of samples. Within a group, people come in random order, the samples of each
    together.

    Raises:
        DatasetError: a group would have nobody.
    """
    people, which = torch.unique(person, return_inverse=True)
    n = len(people)
    first, second = round(shares[0] * n), round((shares[0] + shares[1]) * n)
    if not 0 < first < second < n:
        raise DatasetError(
            f"{n} people cannot be shared among clients, auxiliary and test as {shares}: each "
            f"group needs one or more"
        )
    rank = torch.randperm(n, generator=generator(seed, "people"))[which]
    order = torch.argsort(rank, stable=True)
    rank = rank[order]
    return {
        "clients": order[rank < first],
        "auxiliary": order[(rank >= first) & (rank < second)],
        "test": order[rank >= second],
    }

"""What a sweep file says: defenses with their strengths, run settings, attacks.

A defense of the file is a line of the utility-privacy figure: one spec, in which
``{strength}`` stands for each of its ``strengths`` in turn.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from fl_privacy.component import Component
from fl_privacy.settings import Scalar
from fl_privacy.sweep.filling import (
    AUXILIARY,
    CLIENTS,
    FROM_TRAINED,
    SETTINGS,
    STRENGTH,
    filled,
    places,
)
from fl_privacy.sweep.offline import Attack, Measure, underscored
from fl_privacy.sweep.run_tables import RunTable, Table, hyphens, known


class DefenseLine(Component):
    """One defense at some strengths; an empty spec is no defense."""

    spec: Annotated[str, Field(description="defenses joined by +; {strength} is filled in")] = ""
    strengths: Annotated[
        tuple[float | int | str, ...], Field(description="what {strength} stands for, in turn")
    ] = ()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (STRENGTH in places(self.spec)) != bool(self.strengths):
            raise ValueError(
                f"spec and strengths go together: expected {{{STRENGTH}}} in the spec and a list "
                f"of strengths, or neither; got spec {self.spec!r} and strengths {self.strengths}"
            )
        if len(set(map(str, self.strengths))) < len(self.strengths):
            raise ValueError(f"strengths: each once, got {self.strengths}")
        return self

    def specs(self) -> list[tuple[str, str]]:
        """Strength and spec of each point, in the order of the file."""
        if not self.strengths:
            return [("", self.spec)]
        return [(str(s), filled(self.spec, {STRENGTH: s})) for s in self.strengths]


class Sweep(Component):
    """A whole sweep file."""

    title: Annotated[str, Field(description="heading of the page")] = ""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="each repeats everything: model, data, noise, attack"),
    ] = (0,)
    reference: Annotated[
        str, Field(description="defense whose error is divided by the others'")
    ] = ""
    run: Annotated[RunTable, Field(default_factory=dict, description="run settings of every point")]
    train: Annotated[
        RunTable | None, Field(description="settings of the run that measures accuracy and cost")
    ] = None
    record: Annotated[
        Table | None, Field(description="settings of the run whose updates are attacked")
    ] = None
    axes: Annotated[
        dict[str, tuple[Scalar, ...]],
        BeforeValidator(hyphens),
        Field(
            default_factory=dict,
            description="run settings, or names that stand in texts as {name}, to cross with all",
        ),
    ]
    one_at_a_time: Annotated[
        bool,
        Field(description="change one axis, or the defense, at a time, from the first of each"),
    ] = False
    defenses: Annotated[dict[str, DefenseLine], Field(min_length=1)]
    attacks: tuple[Attack, ...] = ()
    measures: tuple[Measure, ...] = ()

    _keys = model_validator(mode="before")(underscored)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        offline = self.attacks or self.measures
        if self.train is None and not offline:
            raise ValueError("nothing to do: give a table [train], an [[attacks]] or [[measures]]")
        if self.record is not None and not offline:
            raise ValueError(
                "[record] is there to be attacked or measured: add an [[attacks]] or [[measures]]"
            )
        if (self.record or {}).get(FROM_TRAINED) and self.train is None:
            raise ValueError(f"{FROM_TRAINED} = true needs a table [train]")
        if self.reference and self.reference not in self.defenses:
            raise ValueError(
                f"reference {self.reference!r} is no defense of this file; there are: "
                f"{', '.join(self.defenses)}"
            )
        self._check_axes()
        _refuse_doubles("[[attacks]] called", [attack.title for attack in self.attacks])
        every = [one.title for measure in self.measures for one in measure.each()]
        _refuse_doubles("[[measures]] of", every)
        _refuse_doubles("points called", [point.name for point in self.points()])
        return self

    def _check_axes(self) -> None:
        texts = places(self.model_dump_json(exclude={"axes"}))
        for key, values in self.axes.items():
            if key in (STRENGTH, AUXILIARY):
                raise ValueError(f"axes.{key}: {{{key}}} means something else; rename it")
            for table, held in (("train", self.train), ("record", self.record)):
                if key in (held or {}):
                    raise ValueError(f"{key} is an axis, so it cannot be in [{table}] too")
            if not values or len(set(map(str, values))) < len(values):
                raise ValueError(f"axes.{key}: expected values, each once, got {values}")
            if key in texts and key not in (*SETTINGS, CLIENTS):
                continue
            for value in values:
                known({key: value})

    def points(self) -> list[Point]:
        """Every combination of axes, defense and strength, in the order of the file.

        One at a time: those that differ from the first in one axis, or in the defense.
        """
        every = self._every()
        if not self.one_at_a_time:
            return every
        return [point for point in every if point.changes(every[0]) <= 1]

    def _every(self) -> list[Point]:
        return [
            Point(tuple(zip(self.axes, values, strict=True)), name, strength, spec)
            for values in product(*self.axes.values())
            for name, line in self.defenses.items()
            for strength, spec in line.specs()
        ]


@dataclass(frozen=True)
class Point:
    """One dot of the figure: a defense at one strength, and the values of the axes."""

    axes: tuple[tuple[str, Scalar], ...]
    defense: str
    strength: str
    spec: str

    def changes(self, other: Point) -> int:
        """In how many axes it differs from ``other``, the defense being one."""
        axes = sum(a != b for a, b in zip(self.axes, other.axes, strict=True))
        return axes + ((self.defense, self.strength) != (other.defense, other.strength))

    @property
    def group(self) -> str:
        """The axes in words; empty without any."""
        return ", ".join(f"{key} {value}" for key, value in self.axes)

    @property
    def label(self) -> str:
        """Defense and strength."""
        return f"{self.defense} {self.strength}".strip()

    @property
    def name(self) -> str:
        """A name for a folder, the same for the same point."""
        parts = [*(f"{key}-{value}" for key, value in self.axes), self.defense]
        whole = "--".join(map(slug, parts))
        return slug(f"{whole}-{slug(self.strength)}" if self.strength else whole, limit=120)


def slug(text: str, limit: int = 48) -> str:
    """``text`` as a part of a file name: letters, digits, dots, hyphens, underscores.

    A text that has to be changed for that gets a piece of its digest, so that two different
    texts do not share a name.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    if plain == text and 0 < len(plain) <= limit:
        return plain
    tail = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[: limit - 7].rstrip('-._')}-{tail}".lstrip("-")


def _refuse_doubles(what: str, names: list[str]) -> None:
    """Names differ by more than capitals, which not every file system tells apart."""
    doubles = [name for name, n in Counter(map(str.casefold, names)).items() if n > 1]
    if doubles:
        raise ValueError(f"two {what} {doubles[0]!r}; rename one")

"""What a sweep does on every recording once it is made: attacks, and measures of layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fl_privacy import component
from fl_privacy.component import Component
from fl_privacy.measuring import MeasurePlan
from fl_privacy.plan import METRICS, Plan
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import Scalar
from fl_privacy.sweep.filling import filled
from fl_privacy.threat_model import ThreatModel
from fl_privacy.truth import TruthError, TruthVault
from fl_privacy.types import PositiveInt


def underscored(table: Any) -> Any:
    """Keys as fields are called; hyphens stand in sweep files too."""
    if not isinstance(table, dict):
        return table
    return {str(key).replace("-", "_"): value for key, value in table.items()}


class Attack(Component):
    """Who attacks every point; ``adaptive`` adds those that know its defense, and others.

    A number takes so many of either, those that should do most first. ``own_partition`` makes one
    of the clients the adversary, as in [Melis]: its updates are no targets, and aggregates come
    without them.
    """

    adversary: Annotated[str, Field(description="adversary, as name(setting=value)")]
    name: Annotated[str, Field(description="name in figures; empty: the adversary's")] = ""
    adaptive: Annotated[
        bool | PositiveInt,
        Field(description="also those that know the defense, and those for all; 2: two of either"),
    ] = False
    metrics: Annotated[tuple[str, ...], Field(description="scores beside the usual ones")] = ()
    targets: Annotated[PositiveInt | None, Field(description="first targets; none: all")] = None
    rounds: Annotated[str, Field(description="rounds to attack; empty: all recorded")] = ""
    threat_model: ThreatModel = ThreatModel()
    own_partition: Annotated[
        int | None, Field(ge=0, description="partition of the client that is the adversary itself")
    ] = None

    _keys = model_validator(mode="before")(underscored)

    @model_validator(mode="after")
    def _one_self(self) -> Self:
        if self.own_partition is not None and self.threat_model.own_node:
            raise ValueError("own_partition names the adversary's node: leave own_node out")
        return self

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or component.parse(self.adversary)[0]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its results on a recording."""
        unset = {"own_partition"} if self.own_partition is None else set()
        return self.model_dump(mode="json", exclude=unset)

    def filled(self, values: Mapping[str, Scalar]) -> Attack:
        """It with the names in its texts replaced by what they stand for at a point."""
        held = {"auxiliary": filled(self.threat_model.auxiliary, values)}
        return self.model_copy(
            update={
                "adversary": filled(self.adversary, values),
                "threat_model": self.threat_model.model_copy(update=held),
            }
        )

    def plan(self, seed: int, device: str, run: Path | None = None) -> Plan:
        """The analysis of one recording, that of ``run`` where the adversary is one of its clients.

        Raises:
            TruthError: the run has no such client.
        """
        own = {}
        if run is not None and self.own_partition is not None:
            own = {"own_node": node_of(run, self.own_partition)}
        return Plan(
            adversary=self.adversary,
            threat_model=self.threat_model.model_copy(update=own),
            metrics=tuple(dict.fromkeys((*METRICS, *self.metrics))),
            targets=self.targets,
            rounds=self.rounds,
            seed=seed,
            device=device,
        )


class Measure(Component):
    """Which layer metrics are measured at every point, on whose samples.

    They are named one by one, so that each point has the same, and one that refuses is missed.
    Each is a step of its own.
    """

    metrics: Annotated[
        tuple[str, ...], Field(min_length=1, description="layer metrics, as name(setting=value)")
    ]
    name: Annotated[str, Field(description="name of this list; empty: the metrics'")] = ""
    auxiliary: Annotated[str, Field(description="dataset, or file *.npz, of the adversary")] = ""
    audit: Annotated[bool, Field(description="measure on the clients' own samples")] = False
    rounds: Annotated[str, Field(description="rounds, such as 1-5,10; empty: the last one")] = ""
    together: Annotated[bool, Field(description="one measurement over all of these rounds")] = False

    _keys = model_validator(mode="before")(underscored)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.audit and self.auxiliary:
            raise ValueError("expected auxiliary or audit, got both: choose whose samples")
        return self

    @property
    def title(self) -> str:
        """What it is called."""
        specs = ", ".join(self.metrics)
        return f"{self.name}: {specs}" if self.name else specs

    def each(self) -> tuple[Measure, ...]:
        """One for each metric."""
        return tuple(self.model_copy(update={"metrics": (spec,)}) for spec in self.metrics)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its numbers on a recording."""
        return self.model_dump(mode="json", exclude={"name"})

    def filled(self, values: Mapping[str, Scalar]) -> Measure:
        """It with the names in its texts replaced by what they stand for at a point."""
        return self.model_copy(
            update={
                "metrics": tuple(filled(spec, values) for spec in self.metrics),
                "auxiliary": filled(self.auxiliary, values),
            }
        )

    def plan(self, seed: int, device: str) -> MeasurePlan:
        """The measurements of one recording."""
        return MeasurePlan(
            metrics=self.metrics,
            auxiliary=self.auxiliary,
            audit=self.audit,
            rounds=self.rounds,
            together=self.together,
            seed=seed,
            device=device,
        )


def node_of(run: Path, partition: int) -> str:
    """The node that held a partition in an audited run; node ids are new in each simulation.

    Raises:
        TruthError: no client of the run wrote down that it did.
    """
    nodes = TruthVault(RunFolder(run).truth).nodes()
    if partition not in nodes:
        there = ", ".join(map(str, sorted(nodes))) or "none"
        raise TruthError(
            f"own_partition {partition}: no client of {run} held that partition; there are: {there}"
        )
    return nodes[partition]

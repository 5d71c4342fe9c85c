"""The Flower run config, parsed once into typed settings.

Flower hands over flat scalars with hyphenated keys. What a recording may hold of them is
declared `Recorded`; everything else stays out: keys that begin with ``client-`` are the
clients' own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_privacy.component import ComponentError, describe
from fl_privacy.types import LocalTraining, NonNegativeFloat, PositiveFloat, PositiveInt

Scalar = bool | int | float | str


Recorded = partial(Field, json_schema_extra={"recorded": True})
"""A field that a recording may hold."""


class RunSettings(BaseModel):
    """Everything a run can be told."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
    )

    seed: Annotated[int, Recorded(description="seed of model, partition, batches, noise")] = 0
    dataset: Annotated[str, Recorded(description="where inputs come from")] = "fashion-mini"
    partition: Annotated[str, Recorded(description="how clients share the training split")] = "iid"
    model: Annotated[str, Recorded(description="network architecture")] = "lenet-zhu"
    strategy: Annotated[str, Recorded(description="Flower strategy that aggregates")] = "fedavg"
    dp_strategy: Annotated[
        str, Recorded(description="Flower's central differential privacy; empty: none")
    ] = ""
    min_clients: Annotated[
        PositiveInt, Recorded(description="clients that have to be there before a round starts")
    ] = 2
    wait_seconds: Annotated[
        PositiveFloat, Field(description="how long a round waits for them before the run ends")
    ] = 600.0
    round_seconds: Annotated[
        PositiveFloat, Field(description="how long a round waits for replies; then without them")
    ] = 3600.0
    num_server_rounds: Annotated[PositiveInt, Recorded(description="rounds to run")] = 3
    fraction_train: Annotated[float, Recorded(gt=0, le=1, description="clients in a round")] = 1.0
    algorithm: Annotated[
        Literal["fedsgd", "fedavg"], Recorded(description="one step on one batch, or local epochs")
    ] = "fedsgd"
    lr: Annotated[PositiveFloat, Recorded(description="learning rate of local SGD")] = 0.01
    momentum: Annotated[float, Recorded(ge=0, lt=1, description="momentum of local SGD")] = 0.0
    weight_decay: Annotated[NonNegativeFloat, Recorded(description="L2 penalty of local SGD")] = 0.0
    local_epochs: Annotated[PositiveInt, Recorded(description="passes over the data (fedavg)")] = 1
    batch_size: Annotated[PositiveInt, Recorded(description="samples a step")] = 1
    drop_last: Annotated[bool, Recorded(description="leave out an incomplete last batch")] = False
    order: Annotated[
        Literal["shuffled", "sequential"], Recorded(description="order of the samples")
    ] = "shuffled"
    batch_norm: Annotated[
        Literal["train", "eval"], Recorded(description="mode of batch norm in local training")
    ] = "train"
    out_dir: Annotated[str, Field(description="run folder, absolute, new or resumable")] = ""
    resume: Annotated[
        bool,
        Recorded(description="add an attempt to the recording in out-dir, from its last model"),
    ] = False
    initial_model: Annotated[
        str, Recorded(description="safetensors file of the first parameters; empty: by the seed")
    ] = ""
    audit: Annotated[bool, Recorded(description="clients write their truth into out-dir/truth")] = (
        False
    )
    record_rounds: Annotated[
        str,
        Recorded(
            pattern=r"^(\d+(-\d*)?(,\d+(-\d*)?)*)?$", description="such as 1-5,10; empty: all"
        ),
    ] = ""
    record_clients: Annotated[
        int, Recorded(ge=0, description="clients a round to record; 0: all")
    ] = 0
    record_bytes: Annotated[
        int, Recorded(ge=0, description="bytes that the recording may take in all; 0: any number")
    ] = 0
    record_failures: Annotated[
        Literal["fail", "go-on"],
        Recorded(description="where the disk is full, end the run, or train on unrecorded"),
    ] = "fail"
    sorted_replies: Annotated[
        bool, Recorded(description="aggregate in partition order, for reproducible sums")
    ] = True
    malformed_replies: Annotated[
        Literal["leave-out", "fail"],
        Recorded(description="leave such replies out of the aggregate, or end the run"),
    ] = "leave-out"
    eval_samples: Annotated[
        int, Recorded(ge=0, description="test samples that score the global model; 0: all")
    ] = 2000
    client_defense: Annotated[str, Field(description="defenses joined by +; empty: none")] = ""
    client_defended_share: Annotated[
        float,
        Field(ge=0, le=1, description="share of clients (lowest partition ids, rounded) to defend"),
    ] = 1.0
    client_dataset: Annotated[
        str, Field(description="dataset of a node's own, all of it its share; empty: its partition")
    ] = ""
    client_audit_dir: Annotated[
        str,
        Field(description="absolute; where a node keeps the truth of audits; empty: out-dir"),
    ] = ""
    client_state_dir: Annotated[
        str,
        Field(description="absolute; where dp_sgd keeps its account; empty: out-dir/clients"),
    ] = ""
    client_report_epsilon: Annotated[
        bool, Field(description="dp_sgd tells the server its epsilon and delta")
    ] = False

    client_encoding: Annotated[
        Literal["dense", "sparse"],
        Field(description="upload all values, or those that differ from what was sent if smaller"),
    ] = "dense"
    client_property: Annotated[
        str, Field(description="property of the dataset's samples that victims are to leak")
    ] = ""
    client_property_schedule: Annotated[
        str,
        Field(
            pattern=r"^(every:[1-9]\d*|mixed)?$",
            description="every:K, victims' samples have the property in each K-th round alone; "
            "mixed, as they come; empty: none",
        ),
    ] = ""
    client_victims: Annotated[
        PositiveInt,
        Field(description="clients (lowest partition ids) with samples that have the property"),
    ] = 1
    client_active_clients: Annotated[
        int,
        Field(ge=0, description="clients (highest partition ids) that attack with a second head"),
    ] = 0
    client_active_alpha: Annotated[
        float,
        Field(ge=0, le=1, description="their loss is alpha L_main + (1 - alpha) L_property"),
    ] = 0.5

    @model_validator(mode="after")
    def _property_named(self) -> Self:
        for name in ("client_property_schedule", "client_active_clients"):
            if getattr(self, name) and not self.client_property:
                raise ValueError(
                    f"{name.replace('_', '-')} needs client-property, the name of a property of "
                    f"the dataset's samples"
                )
        return self

    @property
    def local_training(self) -> LocalTraining:
        """What the server prescribes for local training."""
        return LocalTraining(
            algorithm=self.algorithm,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            order=self.order,
            batch_norm=self.batch_norm,
        )

    def public(self) -> dict[str, Scalar]:
        """The settings a recording may hold: those declared `Recorded`."""
        fields = type(self).model_fields.items()
        recorded = {name for name, field in fields if field.json_schema_extra == {"recorded": True}}
        return self.model_dump(by_alias=True, include=recorded)

    def is_active(self, client: int, clients: int) -> bool:
        """Whether ``client`` of ``clients`` is an active adversary."""
        return client >= clients - self.client_active_clients

    def defended(self, clients: int) -> int:
        """How many of ``clients`` defend, those with the lowest partition ids."""
        return round(self.client_defended_share * clients)


def parse_settings(config: Mapping[str, object]) -> RunSettings:
    """Validate a Flower run config.

    Raises:
        ComponentError: a key or value is wrong; the message names it and lists the keys.
    """
    try:
        return RunSettings.model_validate(dict(config))
    except ValidationError as error:
        raise ComponentError(describe("run config", RunSettings, error)) from None

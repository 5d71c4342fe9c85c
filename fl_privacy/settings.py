"""The Flower run config, parsed once into typed settings.

Flower hands over flat scalars with hyphenated keys. Keys that begin with
``client-`` are the clients' own business: they never enter a recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_privacy.component import ComponentError, describe
from fl_privacy.types import LocalTraining, NonNegativeFloat, PositiveFloat, PositiveInt

Scalar = bool | int | float | str


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

    seed: Annotated[int, Field(description="seed of model, partition, batches, noise")] = 0
    dataset: Annotated[str, Field(description="where inputs come from")] = "fashion-mini"
    partition: Annotated[str, Field(description="how clients share the training split")] = "iid"
    model: Annotated[str, Field(description="network architecture")] = "lenet-zhu"
    strategy: Annotated[str, Field(description="Flower strategy that aggregates")] = "fedavg"
    min_clients: Annotated[PositiveInt, Field(description="clients to wait for before round 1")] = 2
    num_server_rounds: Annotated[PositiveInt, Field(description="rounds to run")] = 3
    fraction_train: Annotated[float, Field(gt=0, le=1, description="clients in a round")] = 1.0
    algorithm: Annotated[
        Literal["fedsgd", "fedavg"], Field(description="one step on one batch, or local epochs")
    ] = "fedsgd"
    lr: Annotated[PositiveFloat, Field(description="learning rate of local SGD")] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of local SGD")] = 0.0
    weight_decay: Annotated[NonNegativeFloat, Field(description="L2 penalty of local SGD")] = 0.0
    local_epochs: Annotated[PositiveInt, Field(description="passes over the data (fedavg)")] = 1
    batch_size: Annotated[PositiveInt, Field(description="samples a step")] = 1
    drop_last: Annotated[bool, Field(description="leave out an incomplete last batch")] = False
    order: Annotated[
        Literal["shuffled", "sequential"], Field(description="order of the samples")
    ] = "shuffled"
    batch_norm: Annotated[
        Literal["train", "eval"], Field(description="mode of batch norm in local training")
    ] = "train"
    out_dir: Annotated[str, Field(description="run folder, absolute, new or resumable")] = ""
    resume: Annotated[
        bool, Field(description="add an attempt to the recording in out-dir, from its last model")
    ] = False
    audit: Annotated[bool, Field(description="clients write their truth into out-dir/truth")] = (
        False
    )
    record_rounds: Annotated[
        str,
        Field(pattern=r"^(\d+(-\d*)?(,\d+(-\d*)?)*)?$", description="such as 1-5,10; empty: all"),
    ] = ""
    record_clients: Annotated[int, Field(ge=0, description="clients a round to record; 0: all")] = 0
    sorted_replies: Annotated[
        bool, Field(description="aggregate in partition order, for reproducible sums")
    ] = True
    client_defense: Annotated[str, Field(description="defenses joined by +; empty: none")] = ""
    client_defended_share: Annotated[
        float, Field(ge=0, le=1, description="share of clients (lowest partition ids) that defend")
    ] = 1.0

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
        """The settings a recording may hold: all but the clients' own and the path."""
        dumped: dict[str, Scalar] = self.model_dump(by_alias=True)
        return {k: v for k, v in dumped.items() if not k.startswith("client-") and k != "out-dir"}


def parse_settings(config: Mapping[str, object]) -> RunSettings:
    """Validate a Flower run config.

    Raises:
        ComponentError: a key or value is wrong; the message names it and lists the keys.
    """
    try:
        return RunSettings.model_validate(dict(config))
    except ValidationError as error:
        raise ComponentError(describe("run config", RunSettings, error)) from None

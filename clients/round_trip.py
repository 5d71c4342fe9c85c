"""One round trip of a client: which it is, and where an audit keeps its truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message
from pydantic import ValidationError
from torch import Tensor

from fl_privacy.component import ComponentError, describe
from fl_privacy.settings import RunSettings
from fl_privacy.truth import TruthVault
from fl_privacy.types import Samples, Task

_NORMALIZATION = ("mean", "std")


@dataclass(frozen=True)
class RoundTrip:
    """Which round trip this is, and where an audit keeps its truth (None: nowhere)."""

    attempt: int
    round: int
    node: str
    vault: TruthVault | None

    def keep(self, step: int, batch: Samples, indices: Tensor) -> None:
        """In an audit, store the batch of one step; the first clears what was there before."""
        if self.vault is not None:
            if step == 0:
                self.vault.clear(attempt=self.attempt, round=self.round, node=self.node)
            self.vault.write(
                attempt=self.attempt,
                round=self.round,
                node=self.node,
                step=step,
                samples=batch,
                indices=indices,
            )

    def keep_defense(self, spec: str, stats: dict[str, float]) -> None:
        """In an audit, store which defense ran and what it reports."""
        if self.vault is not None:
            self.vault.write_defense(
                attempt=self.attempt, round=self.round, node=self.node, spec=spec, stats=stats
            )


def round_trip_of(message: Message, context: Context, settings: RunSettings) -> RoundTrip:
    """Round and attempt from the message's ConfigRecord, node from the context.

    Raises:
        ComponentError: the server says no round or asks for a proximal term, or an audit has no
            absolute folder.
    """
    config = config_of(message)
    server_round, attempt = config.get("server-round"), config.get("attempt", 1)
    if not isinstance(server_round, int) or not isinstance(attempt, int):
        raise ComponentError(
            f"expected whole numbers server-round and attempt in the message's ConfigRecord, "
            f"got {config}"
        )
    refuse_proximal_term(config.get("proximal-mu"))
    vault = TruthVault(truth_folder(settings)) if settings.audit else None
    return RoundTrip(attempt, server_round, str(context.node_id), vault)


def config_of(message: Message) -> dict[str, object]:
    """What the server says beside the parameters."""
    return {k: v for record in message.content.config_records.values() for k, v in record.items()}


def normalization(task: Task) -> dict[str, list[float]]:
    """How inputs are normalized, for the message to each client: `told_task` reads it."""
    return {f"input-{name}": list(getattr(task, name)) for name in _NORMALIZATION}


def told_task(message: Message, task: Task) -> Task:
    """A dataset's task with inputs normalized as the server says, so that all do it alike.

    Raises:
        ComponentError: the server's inputs have other channels.
    """
    config = config_of(message)
    told = {n: config[f"input-{n}"] for n in _NORMALIZATION if f"input-{n}" in config}
    try:
        return Task.model_validate({**task.model_dump(), **told})
    except ValidationError as error:
        raise ComponentError(describe("the server's task", Task, error)) from None


def truth_folder(settings: RunSettings) -> Path:
    """Where the truth of a run goes; below ``client-audit-dir`` in a folder named as the run.

    Raises:
        ComponentError: a folder is relative, or the server gives the run no name.
    """
    run, own = Path(settings.out_dir), Path(settings.client_audit_dir)
    if not run.is_absolute() or run.name in ("", ".."):
        raise ComponentError(f"an audit needs an absolute out-dir, got {settings.out_dir!r}")
    if not settings.client_audit_dir:
        return run / "truth"
    if not own.is_absolute():
        raise ComponentError(f"client-audit-dir must be absolute, got {str(own)!r}")
    return own / run.name / "truth"


def refuse_proximal_term(mu: object) -> None:
    """Refuse what a strategy may ask of local training, which has no such term.

    Raises:
        ComponentError: ``mu`` is neither 0 nor None.
    """
    if mu:
        raise ComponentError(
            f"the strategy asks for a proximal term (proximal-mu {mu!r}), which "
            f"local training does not have: use fedprox(proximal_mu=0) or another strategy"
        )

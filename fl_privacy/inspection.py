"""What ``fl-privacy inspect`` and ``fl-privacy list`` show, as rich tables."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel
from rich.filesize import decimal
from rich.table import Table

from fl_privacy.component import ComponentError, Group, find, installed
from fl_privacy.printable import plain, printable
from fl_privacy.recording import Entry, Manifest, Recording, Refusal
from fl_privacy.run_folder import RunFolder
from fl_privacy.settings import RunSettings
from strategies.differential_privacy import dp_parameters, dp_strategies
from strategies.flower import flower_strategies, parameters_of

SHOWN_ERRORS = 5


def location_of(run: str) -> str | Path:
    """The recording of a run folder or URL; a recording itself is taken as it is."""
    if "://" in run:
        return run if run.rstrip("/").endswith("/recording") else f"{run.rstrip('/')}/recording"
    path = Path(run)
    return path if (path / "manifest.json").exists() else RunFolder(path).recording


def overview(recording: Recording) -> Iterator[Table]:
    """What was recorded, attempt by attempt, and what failed."""
    entries = list(recording.entries(status=None))
    yield _facts(recording, entries)
    yield _attempts(recording, entries)
    errors = Counter(entry.status for entry in entries if not entry.ok)
    if errors:
        table = Table("times", "error", title="Errors", title_justify="left")
        for status, times in errors.most_common(SHOWN_ERRORS):
            table.add_row(str(times), printable(status))
        yield table
    if refusals := list(recording.refusals()):
        yield _refused(refusals)


def recorded(run: Path) -> str:
    """What to tell at the end of a run: where it is, and what of it is missing and why."""
    entries = list(Recording(RunFolder(run).recording).entries(status=None))
    missing = [entry.status for entry in entries if entry.unrecorded]
    said = f"Recorded in {run}. Look at it: fl-privacy inspect {run}"
    errors = Counter(e.status for e in entries if not (e.ok or e.unrecorded))
    if errors:
        worst, times = errors.most_common(1)[0]
        said = (
            f"{sum(errors.values())} of {len(entries)} replies are errors, {times} of them: "
            f"{plain(worst.removeprefix('error: '))}\n{said}"
        )
    if not missing:
        return said
    reason = missing[-1].removeprefix("error: ").removeprefix("not recorded: ")
    return f"{len(missing)} of {len(entries)} replies are not recorded: {plain(reason)}\n{said}"


def _refused(refusals: list[Refusal]) -> Table:
    """Replies that the server kept out of the aggregate, by reason."""
    table = Table(
        "times", "rounds", "clients", "reason", title="Not aggregated", title_justify="left"
    )
    for reason, times in Counter(r.reason for r in refusals).most_common(SHOWN_ERRORS):
        mine = [r for r in refusals if r.reason == reason]
        clients = str(len({r.node for r in mine}))
        table.add_row(str(times), _ranges({r.round for r in mine}), clients, printable(reason))
    return table


def _facts(recording: Recording, entries: list[Entry]) -> Table:
    table = Table(show_header=False, box=None)
    replies = [entry for entry in entries if entry.ok]
    sparse = sum(entry.payload == "sparse-update" for entry in replies)
    encoding = f"sparse in {sparse} of {len(replies)}, the values that changed alone"
    for name, value in (
        *_rows_of(recording.manifest),
        *([("replies", encoding)] if sparse else []),
    ):
        table.add_row(name, printable(value))
    return table


def _rows_of(manifest: Manifest) -> Iterator[tuple[str, str]]:
    config = manifest.run_config
    yield "recorded", manifest.created
    yield "model", manifest.model or "unknown"
    yield "dataset", manifest.dataset or "unknown"
    if manifest.task:
        shape = " x ".join(map(str, manifest.task.input_shape))
        yield "task", f"{manifest.task.classes} classes, inputs {shape}"
    if training := manifest.local_training:
        yield "training", ", ".join(f"{k} {v}" for k, v in training)
    yield "strategy", str(config.get("strategy", "unknown"))
    if central := config.get("dp-strategy"):
        yield "dp-strategy", str(central)
    yield "partition", str(config.get("partition", "unknown"))
    yield "versions", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())


def _attempts(recording: Recording, entries: list[Entry]) -> Table:
    columns = ["attempt", "rounds", "clients", "updates", "errors", "size"]
    encoded = any(entry.payload == "sparse-update" for entry in entries)
    columns += ["if dense"] if encoded else []
    table = Table(*columns, title="Recorded", title_justify="left")
    for attempt in sorted({entry.attempt for entry in entries}):
        mine = [entry for entry in entries if entry.attempt == attempt]
        kept = [entry for entry in mine if entry.ok]
        table.add_row(
            str(attempt),
            _ranges({entry.round for entry in mine}),
            str(len({entry.node for entry in mine})),
            str(len(kept)),
            str(len(mine) - len(kept)),
            decimal(sum(entry.bytes for entry in kept)),
            *([decimal(sum(_dense_bytes(recording, e) for e in kept))] if encoded else []),
        )
    return table


def _dense_bytes(recording: Recording, entry: Entry) -> int:
    """Size of a reply, or of the tensors that a sparse one stands for."""
    sparse = entry.payload == "sparse-update"
    return recording.schema(entry.schema_digest).nbytes if sparse else entry.bytes


def _ranges(numbers: set[int]) -> str:
    """``{1, 2, 3, 7}`` as ``1-3,7``."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def groups() -> tuple[str, ...]:
    """Everything that can be listed."""
    return (*get_args(Group), "strategies", "dp-strategies", "settings")


def listing(group: str) -> Table:
    """The components of a group (or Flower's strategies, or the run settings)."""
    heads = ("name", "default", "meaning") if group == "settings" else ("name", "settings", "what")
    table = Table(title=group.replace("_", " "), title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in list(_rows(group)) or [("none installed", "", "")]:
        table.add_row(*map(printable, row))
    return table


def _rows(group: str) -> Iterator[tuple[str, str, str]]:
    if group == "settings":
        for name, field in RunSettings.model_fields.items():
            yield name.replace("_", "-"), repr(field.default), field.description or ""
    elif group == "strategies":
        for name, strategy in sorted(flower_strategies().items()):
            yield name, _defaults(parameters_of(strategy)), _first_line(strategy)
    elif group == "dp-strategies":
        for name, wrapper in sorted(dp_strategies().items()):
            yield name, _defaults(dp_parameters(wrapper)), _first_line(wrapper)
    else:
        for name in sorted(installed(cast(Group, group))):
            yield name, *_described(cast(Group, group), name)


def _described(group: Group, name: str) -> tuple[str, str]:
    """Settings and purpose of a component, or why it cannot be loaded."""
    try:
        component = find(group, name)
    except ComponentError as error:
        return "", str(error)
    defaults = {
        key: inspect.Parameter.empty if field.is_required() else field.get_default()
        for key, field in component.model_fields.items()
    }
    return _defaults(defaults), _first_line(component)


def _defaults(settings: dict[str, Any]) -> str:
    return ", ".join(
        key if value is inspect.Parameter.empty else f"{key}={_plain(value)}"
        for key, value in settings.items()
    )


def _plain(value: Any) -> str:
    return repr(value.model_dump() if isinstance(value, BaseModel) else value)


def _first_line(thing: type) -> str:
    """Without the backticks that mark names in a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0].replace("`", "")

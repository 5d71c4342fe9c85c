"""Replies that were kept out of the aggregate, and why: one small file for each such round.

``refused/<attempt>-<round>.json``, beside the index: what a line says of a reply, its payload
and status, is what was received, and stays so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fl_privacy.recording_format import RecordingError
from fl_privacy.recording_store import Store

FOLDER = "refused"
REASON_CHARACTERS = 300

_NAME = re.compile(r"([0-9]+)-(-?[0-9]+)\.json")


class Refusal(BaseModel):
    """A reply that was kept out; ``n`` is the number of its index line, None if it has none."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    round: int
    n: int | None
    node: str
    reason: str


_REFUSALS = TypeAdapter(tuple[Refusal, ...])


def file_of(refusals: Sequence[Refusal]) -> tuple[str, bytes]:
    """Path and content of the file for the refusals of one round; long reasons are cut."""
    first = refusals[0]
    short = [r.model_copy(update={"reason": r.reason[:REASON_CHARACTERS]}) for r in refusals]
    data = _REFUSALS.dump_json(tuple(short), indent=1)
    return f"{FOLDER}/{first.attempt}-{first.round}.json", data


def read_refusals(store: Store) -> Iterator[Refusal]:
    """All refusals, by attempt and round.

    Raises:
        RecordingError: a file is damaged; names it.
    """
    matches = filter(None, map(_NAME.fullmatch, store.names(FOLDER)))
    for match in sorted(matches, key=lambda found: (int(found[1]), int(found[2]))):
        path = f"{FOLDER}/{match[0]}"
        try:
            yield from _REFUSALS.validate_json(store.read(path))
        except ValidationError as error:
            raise RecordingError(
                f"{store.where(path)}: damaged ({error.errors()[0]['msg']}); restore the file"
            ) from error

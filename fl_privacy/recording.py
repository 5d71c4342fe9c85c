"""Recordings, format version 1: what a federation exchanged, as the server saw it.

::

    manifest.json                                written once
    index/000000.jsonl ...                       1,000 lines a segment, 512 bytes a line at most
    schemas/<sha>.json                           names in order, shapes, dtypes, kinds, aliases
    globals/<sha>.safetensors                    parameters as sent, once per content
    updates/<attempt>/<round>/<n>.safetensors    replies as received
    refused/<attempt>-<round>.json               those kept out of the aggregate, and why

The writer may be killed at any moment: what the index lists is complete. Tensors
are safetensors, metadata is JSON; nothing is ever unpickled.
"""

from fl_privacy.recording_format import (
    Arrays,
    Entry,
    Layout,
    Manifest,
    RecordingError,
    Reply,
    Schema,
    TensorSpec,
)
from fl_privacy.recording_names import check_fits, match_names
from fl_privacy.recording_reader import Recording
from fl_privacy.recording_refusals import Refusal
from fl_privacy.recording_writer import RecordingWriter

__all__ = [
    "Arrays",
    "Entry",
    "Layout",
    "Manifest",
    "Recording",
    "RecordingError",
    "RecordingWriter",
    "Refusal",
    "Reply",
    "Schema",
    "TensorSpec",
    "check_fits",
    "match_names",
]

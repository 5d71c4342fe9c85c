"""The global model of a run, kept after every round so that a resumed run goes on from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from fl_privacy.recording import Recording, RecordingError
from fl_privacy.recording_store import write_atomically
from fl_privacy.run_folder import RunFolder, RunFolderError


def save_model(path: Path, state: Mapping[str, Tensor], *, attempt: int, round: int) -> None:
    """Keep the aggregated ``state`` of a round in place of the one before, or not at all.

    Raises:
        RunFolderError: the file cannot be written.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = safetensors.torch.save(plain, {"attempt": str(attempt), "round": str(round)})
    try:
        write_atomically([(path, data)])
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}); choose a folder with room"
        ) from error


def load_last_model(model: nn.Module, folder: RunFolder) -> None:
    """Put the last aggregated parameters of a run into ``model``.

    A run that kept none goes on from the last that its recording says were sent.

    Raises:
        RunFolderError, RecordingError: damaged, or parameters of another model.
    """
    path = folder.model if folder.model.exists() else folder.recording
    try:
        state = _kept(path) if path == folder.model else _last_sent(path)
        if state:
            model.load_state_dict(state)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunFolderError(
            f"{path}: damaged ({error}); remove it to resume from the recording"
        ) from error
    except RuntimeError as error:
        raise RecordingError(f"{path}: cannot resume, {error}") from None


def load_initial_model(model: nn.Module, path: str) -> None:
    """Put the parameters that another run kept into ``model``; an empty path leaves it alone.

    Raises:
        RunFolderError: the file is missing, damaged, or of another model.
    """
    if not path:
        return
    try:
        model.load_state_dict(_kept(Path(path)))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise RunFolderError(
            f"initial-model {path!r} cannot be used ({error}): expected the absolute path of the "
            f"model.safetensors of a run with the same model and task"
        ) from None


def _kept(path: Path) -> dict[str, Tensor]:
    return dict(safetensors.torch.load(path.read_bytes()))


def _last_sent(recording: Path) -> dict[str, Tensor]:
    """Of the last reply to something that was stored; nothing where there is none."""
    opened = Recording(recording)
    known = (entry for entry in opened.entries(status=None) if entry.global_digest)
    last = deque(known, maxlen=1)
    return dict(opened.sent(last[0])) if last else {}

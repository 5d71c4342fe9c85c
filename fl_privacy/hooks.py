"""Looking into a network while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that hold inside alone: ``with hooked(m.register_forward_hook(f) for m in ...)``."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()

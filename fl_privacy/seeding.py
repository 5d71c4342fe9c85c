"""Seeds for everything that draws: a hash of what the draw is for, never a shared stream.

Two draws that differ in any part (seed, round, client, purpose) are independent, and
adding a draw somewhere never shifts another one.
"""

from __future__ import annotations

import hashlib
import json

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in ``[0, 2**63)`` from ``parts``: SHA-256 of their JSON list.

    ``derive_seed(1, "2")`` and ``derive_seed("1", 2)`` differ, so do ``("ab",)`` and
    ``("a", "b")``. The same in every process and on every machine.
    """
    text = json.dumps(list(parts), separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))

"""Names of parameters, and of the modules that hold them."""

from __future__ import annotations


def within(name: str, layer: str) -> bool:
    """Whether a parameter is ``layer`` itself or lies in the module of that name."""
    return name == layer or name.startswith(f"{layer}.")

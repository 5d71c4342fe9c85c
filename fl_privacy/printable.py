"""Text from others, made fit for a terminal: a client's error must not steer it.

Escape sequences retitle windows, clear screens and hide what was said before; brackets
are markup to rich, which would swallow a path or refuse to print it.
"""

from __future__ import annotations

from rich.markup import escape


def printable(text: str) -> str:
    """``text`` for rich: as `plain`, and its brackets are shown instead of obeyed."""
    return escape(plain(text))


def plain(text: str) -> str:
    """``text`` without control and invisible characters; newlines stay, other gaps are spaces."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return " " if character.isspace() else ""

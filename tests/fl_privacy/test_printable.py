from io import StringIO

import pytest
from rich.console import Console

from fl_privacy.printable import plain, printable


def shown(text: str) -> str:
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=200)
    console.print(printable(text), highlight=False)
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue().rstrip("\n")


@pytest.mark.parametrize(
    "hostile",
    ["\x1b]0;pwned\x07\x1b[2J", "\x9b2J", "a\rb", "\x00\x7f", "\u202egnp.exe", "\udc80"],
)
def test_nothing_steers_the_terminal(hostile: str) -> None:
    assert plain(hostile).isprintable()
    assert shown(hostile).isprintable()


@pytest.mark.parametrize("text", ["/data/[faces]/x.npz", "[/x]", "[bold]no[/]", "Zoë 面"])
def test_what_is_shown_is_what_was_said(text: str) -> None:
    assert shown(text) == text


def test_gaps_stay_gaps() -> None:
    assert plain("one\ttwo\u00a0three\nfour") == "one two three\nfour"

"""The table of scores that commands show in a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from fl_privacy.printable import printable


def titled_table(title: str) -> Table:
    """An empty table under a bold title; others may have written the title's text."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        title=f"[bold]{printable(title)}[/]",
        title_justify="left",
        title_style="",
    )

"""Colors of the series, on the page and in figures that are files of their own.

Figures are drawn once, with stand-ins for colors; the style sheet gives them light or dark ones
on the page, and a file of its own gets the light ones on white paper.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from markupsafe import Markup

SERIES = tuple(f"#0501{i:02d}" for i in range(8))
"""Stand-ins matplotlib draws with; the style sheet's ``--series-<i>`` take their place."""

LIGHT = ("#b4420f", "#17694f", "#3a5fa8", "#8a3f8f", "#8a6d00", "#0f7f8c", "#a32d4e", "#4d5660")
DARK = ("#ff9a62", "#5fcba4", "#8fb1ff", "#e09be6", "#e0c04a", "#5fd3e0", "#ff92b0", "#b8c2cc")
"""Their values on light and on dark paper."""

PAPER: dict[str, str] = {
    "--ink": "#1c2024",
    "--line": "#dfe1e4",
    "--attack": "#b4420f",
    "--guess": "#6b7480",
    **{f"--series-{i}": color for i, color in enumerate(LIGHT)},
}
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Picture:
    """A figure: the name of its file, its caption, and itself."""

    name: str
    caption: str
    drawing: Markup

    @property
    def width(self) -> int:
        """Pixels at which its letters are as large as those of the page, 860 at most."""
        box = re.search(r'viewBox="0 0 ([0-9.]+) ', str(self.drawing))
        assert box is not None
        return min(860, round(1.8 * float(box[1])))


def palette(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each defense, in the order of the file."""
    return dict(zip(names, zip(cycle(SERIES), cycle(MARKERS), strict=False), strict=False))


def colored(figure: Markup) -> Markup:
    """The stand-ins of the series as colors of the style sheet."""
    text = str(figure)
    for i, stand_in in enumerate(SERIES):
        text = text.replace(stand_in, f"var(--series-{i})")
    return Markup(text)


def standalone(figure: Markup) -> str:
    """A figure of the page as a file of its own: plain colors on white paper."""
    text = str(figure)
    for name, color in PAPER.items():
        text = text.replace(f"var({name})", color)
    box = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert box is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[1]}pt" height="{box[2]}pt" '
    end = text.index(">") + 1
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    inside = text[end:]
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n{head}{text[len("<svg ") : end]}{paper}{inside}\n'
    )


def series_style() -> Markup:
    """The colors of the series as style-sheet rules, light and dark."""
    light = "".join(f"--series-{i}: {color};" for i, color in enumerate(LIGHT))
    dark = "".join(f"--series-{i}: {color};" for i, color in enumerate(DARK))
    return Markup(
        f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )

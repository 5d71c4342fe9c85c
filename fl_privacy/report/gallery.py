"""Pictures: the clients' images beside what each adversary made of their updates."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from fl_privacy.metrics.images import psnr_each
from fl_privacy.metrics.matching import Made, assign, in_unit_range, pixels
from fl_privacy.report.scores import Analysis
from fl_privacy.report.signals import Line, drawing, is_signal
from fl_privacy.results import nodes_of, rounds_of
from fl_privacy.types import Reconstruction, Samples

TruthOf = Callable[[Mapping[str, Any]], Samples | None]
"""Row of a target -> the client's own samples, when the run was an audit."""


COLORS = {"attack": "attack", "baseline": "guess"}
"""Kind of a picture -> style-sheet color of its line, the color of its caption."""


@dataclass(frozen=True)
class Picture:
    """One image: who made it, as a PNG, its label, and its PSNR against the truth in dB.

    A signal has a ``drawing`` in place of the PNG in ``source``. Both are empty when there
    is nothing to show; ``note`` then says why.
    """

    maker: str
    kind: str
    source: str = ""
    label: str = ""
    psnr: float | None = None
    note: str = ""
    oracle: bool = False
    width: int = 0
    height: int = 0
    drawing: Markup = Markup()  # noqa: RUF009 - a string

    @property
    def alt(self) -> str:
        """What it shows, for those who cannot see it."""
        said = f"{self.maker}, {self.label}"
        return said if self.psnr is None else f"{said}, PSNR {self.psnr:.1f} dB"


@dataclass(frozen=True)
class Strip:
    """One true image and everything made of it."""

    title: str
    pictures: tuple[Picture, ...]


def png(image: Tensor) -> str:
    """An image ``[1 or 3, height, width]`` in [0, 1] as a ``data:`` address."""
    levels = (pixels(image) * 255).round().to(torch.uint8).movedim(0, -1).squeeze(-1)
    content = io.BytesIO()
    Image.fromarray(levels.numpy()).save(content, format="PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def is_image(shape: Sequence[int]) -> bool:
    """Whether inputs of this shape can be shown."""
    return len(shape) == 3 and shape[0] in (1, 3)


def picks(found: Sequence[Analysis], defense: str | None) -> list[str]:
    """Targets of a group in key order: a rule that looks at no score."""
    return sorted({row["key"] for analysis in found for row in analysis.of(defense)})


def strips(
    found: Sequence[Analysis],
    defense: str | None,
    truth_of: TruthOf,
    names: Sequence[str],
    limit: int,
) -> list[Strip]:
    """The first ``limit`` images of a group's targets, in key order."""
    made: list[Strip] = []
    for key in picks(found, defense):
        for strip in _target(found, key, truth_of, names):
            if len(made) == limit:
                return made
            made.append(strip)
    return made


def _target(
    found: Sequence[Analysis], key: str, truth_of: TruthOf, names: Sequence[str]
) -> Iterator[Strip]:
    rows = {a.label: row for a in found for row in a.rows if row["key"] == key}
    shown = [a for a in found if a.label in rows]
    first = rows[shown[0].label]
    held = truth_of(first)
    truths = {a.label: _scaled(held, a) for a in shown}
    results = {a.label: _scaled(a.reconstruction(key), a) for a in shown}
    pairs = {name: _pairing(r, truths[name]) if r else {} for name, r in results.items()}
    truth = truths[shown[0].label]
    images = len(truth) if truth else max((len(r.inputs) for r in results.values() if r), default=1)
    for i in range(images):
        head = [] if truth is None else [_true(truth, i, names)]
        rest = [
            _made(
                a, rows[a.label], results[a.label], pairs[a.label].get(i), truths[a.label], i, names
            )
            for a in shown
        ]
        yield Strip(_title(first, i, images), (*head, *rest))


def _scaled(made: Made | None, analysis: Analysis) -> Made | None:
    """Inputs in the range that the analysis scored them in."""
    task = analysis.config.task
    return made if made is None or task is None else in_unit_range(made, task)


def _title(row: Mapping[str, Any], i: int, images: int) -> str:
    members = nodes_of(row["node"] or "unknown")
    who = f"client {members[0]}" if len(members) == 1 else f"{len(members)} clients together"
    found = rounds_of(row)
    when = f"round{'s' if len(found) > 1 else ''} {', '.join(map(str, found)) or 'unknown'}"
    parts = [when, who]
    return ", ".join([*parts, f"image {i + 1} of {images}"] if images > 1 else parts)


def _pairing(result: Reconstruction, truth: Samples | None) -> dict[int, int]:
    """True image -> its reconstruction, as the scores match them."""
    if truth is None:
        return {i: i for i in range(len(result.inputs))}
    mine, true = assign(result.inputs, truth.inputs)
    return dict(zip(true.tolist(), mine.tolist(), strict=True))


def _true(truth: Samples, i: int, names: Sequence[str]) -> Picture:
    own = truth.inputs[i]
    return _shown(Picture("truth", "truth", label=_name(truth.labels[i], names)), own, own)


def _made(
    analysis: Analysis,
    row: Mapping[str, Any],
    result: Reconstruction | None,
    index: int | None,
    truth: Samples | None,
    i: int,
    names: Sequence[str],
) -> Picture:
    blank = Picture(
        analysis.label,
        "baseline" if analysis.is_baseline else "attack",
        oracle=bool(analysis.config.oracle),
    )
    if result is None:
        return replace(blank, note=row["message"] or row["status"] or "no reconstruction")
    if index is None:
        return replace(blank, note="no image for this one")
    image = result.inputs[index]
    psnr = (
        float(psnr_each(pixels(image)[None], pixels(truth.inputs[i])[None])[0]) if truth else None
    )
    label = _name(result.labels[index], names) if index < len(result.labels) else ""
    true = truth.inputs[i] if truth else None
    return _shown(replace(blank, label=label, psnr=psnr), image, true)


def _shown(picture: Picture, image: Tensor, truth: Tensor | None) -> Picture:
    if is_signal(image.shape):
        lines = [] if truth is None else [Line(truth, "truth", behind=True)]
        if picture.kind != "truth":
            lines.insert(0, Line(image, COLORS[picture.kind]))
        return replace(picture, drawing=drawing(lines, picture.alt))
    if not is_image(image.shape):
        shape = " x ".join(map(str, image.shape))
        return replace(picture, note=f"inputs of {shape} are neither images nor signals")
    _, height, width = image.shape
    return replace(picture, source=png(image), height=height, width=width)


def _name(label: Tensor, names: Sequence[str]) -> str:
    index = int(label)
    return names[index] if 0 <= index < len(names) else f"class {index}"

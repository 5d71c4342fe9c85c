"""The strip of pictures: the same images, reconstructed under each strength of a defense."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fl_privacy.metrics.matching import assign, in_unit_range, pixels
from fl_privacy.report.figures import STYLE, svg
from fl_privacy.report.gallery import is_image
from fl_privacy.report.reading import read_run
from fl_privacy.sweep.results import Adversary, Measured

COLUMNS = {1: 8, 2: 5}
"""Number of adversaries side by side -> pictures of each."""

Pixels = NDArray[np.float64]


@dataclass(frozen=True)
class Shot:
    """A true image and what was made of it, ``[channels, height, width]`` in [0, 1]."""

    truth: Tensor
    made: Tensor | None


def strip_figure(
    rows: Sequence[tuple[str, Measured]], title: str, what: str, key: str
) -> Markup | None:
    """A row of pictures for each (label, point) below a row of originals.

    Left the plain adversary's, right those of the strongest where there are several.
    The images are the first by the digest of the original of those that every row has: no
    score has a say. None where there are none, or the inputs are no images.
    """
    attacked = [(label, a) for label, m in rows if (a := m.attacked(title))]
    several = any(len(a.adversaries) > 1 for _, a in attacked)
    blocks = [("plain adversary", [(label, shots(a.plain)) for label, a in attacked])]
    if several:
        best = [(label, shots(a.strongest)) for label, a in attacked]
        blocks.append(("strongest adversary", best))
    everything = [row for _, block in blocks for _, row in block]
    common = set.intersection(*(set(row) for row in everything)) if everything else set()
    chosen = sorted(common)[: COLUMNS[len(blocks)]]
    if not chosen:
        return None
    bands = [_band([_first(block, d).truth for _, block in blocks for d in chosen], len(chosen))]
    for number in range(len(attacked)):
        made = [block[number][1][d] for _, block in blocks for d in chosen]
        bands.append(_band([shot.made if shot.made is not None else None for shot in made],
                           len(chosen), like=made[0].truth))  # fmt: skip
    labels = ["original", *(label for label, _ in attacked)]
    return _drawn(bands, labels, [name for name, _ in blocks], what, key)


def _first(block: Sequence[tuple[str, dict[str, Shot]]], digest: str) -> Shot:
    return block[0][1][digest]


def shots(adversary: Adversary) -> dict[str, Shot]:
    """Digest of the original -> what the first seed's adversary made of it.

    Of a batch the first image counts; linked targets of one image share a digest, and the
    first of them is taken.
    """
    results, folder = adversary.results[0], adversary.folders[0]
    truth_of, task = read_run(folder).truth_of, results.config.task
    found: dict[str, Shot] = {}
    for row in results.rows():
        held = truth_of(row) if truth_of else None
        if held is None or task is None or not is_image(held.inputs.shape[1:]):
            continue
        truth = in_unit_range(held, task).inputs
        digest = hashlib.sha256(held.inputs[0].contiguous().numpy().tobytes()).hexdigest()
        result = results.reconstruction(row["key"])
        made = None
        if result is not None:
            inputs = in_unit_range(result, task).inputs
            mine, true = assign(inputs, truth)
            pairs = dict(zip(true.tolist(), mine.tolist(), strict=True))
            made = pixels(inputs[pairs[0]]) if 0 in pairs else None
        found.setdefault(digest, Shot(pixels(truth[0]), made))
    return found


def _band(images: Sequence[Tensor | None], columns: int, like: Tensor | None = None) -> Pixels:
    """Images side by side as RGBA, with a gap after each and a wider one after ``columns``."""
    shape = next(i for i in (*images, like) if i is not None).shape
    gap = max(1, shape[2] // 14)
    parts = []
    for number, image in enumerate(images):
        if number:
            width = gap * (5 if number % columns == 0 else 1)
            parts.append(torch.zeros(4, shape[1], width, dtype=torch.float64))
        parts.append(_rgba(image, shape))
    row = torch.cat(parts, 2)
    below = torch.zeros(4, gap, row.shape[2], dtype=torch.float64)
    return torch.cat([row, below], 1).movedim(0, -1).numpy()


def _rgba(image: Tensor | None, shape: torch.Size) -> Tensor:
    """An image with full opacity; a faint square where nothing was made."""
    if image is None:
        return torch.full((4, shape[1], shape[2]), 0.25, dtype=torch.float64)
    color = image.double().expand(3, *shape[1:])
    return torch.cat([color, torch.ones(1, *shape[1:], dtype=torch.float64)])


def _drawn(
    bands: Sequence[Pixels], labels: Sequence[str], heads: Sequence[str], what: str, key: str
) -> Markup:
    mosaic = np.concatenate(bands)
    height, width = mosaic.shape[:2]
    with matplotlib.rc_context(STYLE):
        inches = 6.2 if len(heads) > 1 else 5.2
        size = (inches + 1.4, inches * height / width + 0.35)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(mosaic, interpolation="none", extent=(0, width, height, 0))
        step = bands[0].shape[0]
        axes.set_yticks([step * (i + 0.46) for i in range(len(bands))], list(labels))
        axes.set_xticks([width * (i + 0.5) / len(heads) for i in range(len(heads))], list(heads))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, key, what)

"""The numbers of a study of layers as text: for the page, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fl_privacy.component import parse
from fl_privacy.metrics.statistics import Interval
from fl_privacy.report.layer_words import number, spoken
from fl_privacy.report.words import plain
from fl_privacy.sweep.layer_drawings import layers_of, shown
from fl_privacy.sweep.layer_study import Number, Quantity, Studied, Table, peaks

PAPER_PEAKS: Mapping[str, str] = {
    "alexnet-mo": "layer 4 (fc1)",
    "vgg11-mo": "layers 9 and 10 (fc1, fc2)",
    "fcnet-mo": "layer 1 (fc1)",
}
"""Where Fig. 1 of [Mo] has the peak of V-information, sensitivity and AUC alike."""


def table(
    found: Table, quantities: Sequence[Quantity], titles: Mapping[str, str]
) -> dict[str, Any]:
    """A row a layer, a column a quantity."""
    layers = layers_of([{q: found[q] for q in quantities}])
    return {
        "heads": [
            {"title": head(q, titles), "unit": q.unit, "column": spoken(q.column)}
            for q in quantities
        ],
        "rows": [
            {"layer": layer, "cells": [cell(found[q].get(layer)) for q in quantities]}
            for layer in layers
        ],
    }


def head(quantity: Quantity, titles: Mapping[str, str]) -> str:
    """What a quantity is called."""
    return plain(titles[quantity.title])


def cell(found: Number | None) -> dict[str, str]:
    """Value with its interval, and its null."""
    if found is None:
        return {"value": "–", "null": ""}
    null = f"null {number(found.null)}" if math.isfinite(found.null) else ""
    return {"value": in_words(found.value), "null": null}


def in_words(value: Interval) -> str:
    """``0.93 [0.85, 0.97]``, three digits that count."""
    said = number(value.mean)
    if not math.isfinite(value.low):
        return said
    return f"{said} [{number(value.low)},\u00a0{number(value.high)}]"


def columns_tables(one: Studied, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Of each metric that has columns of its own a table of them."""
    found = []
    for quantity in shown(one.table):
        own = [q for q in one.table if q.title == quantity.title]
        if len(own) > 1:
            found.append({"title": plain(quantity.title), **table(one.table, own, titles)})
    return found


def peak_lines(one: Studied, titles: Mapping[str, str]) -> list[dict[str, str]]:
    """Where every quantity peaks, and in how many of the repeats it does there."""
    return [
        {
            "quantity": head(peak.quantity, titles),
            "layers": ", ".join(peak.layers),
            "times": f"{peak.times} of {peak.repeats}",
            "value": in_words(peak.value),
            "null": in_words(peak.null),
        }
        for peak in peaks(one.repeats)
    ]


def paper_peak(model: str) -> str:
    """Where the paper has the peak of this network; empty for one that is not the paper's."""
    return PAPER_PEAKS.get(parse(model)[0], "")


COLUMNS = (
    *("point", "group", "defense", "strength", "spec", "model", "seed", "repeats"),
    *("layer", "quantity", "column", "unit", "value", "low", "high", "n", "null", "interval_over"),
)


def csv_text(found: Sequence[Studied]) -> str:
    """Every number of every repeat, then their means (empty seed).

    ``interval_over`` says what the interval is over: the ``repeats``, or inside one ``run`` its
    batches or samples, of which there are ``n``.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in found:
        writer.writerows(_rows(one))
    return text.getvalue()


def _rows(one: Studied) -> Iterator[list[object]]:
    point = one.point
    start = [point.name, point.group, point.defense, point.strength, point.spec, one.model]
    for run, numbers in zip(one.runs, one.repeats, strict=True):
        for single in numbers:
            yield [*start, run.seed, 1, *_cells(single)]
    for layers in one.table.values():
        for mean in layers.values():
            yield [*start, "", mean.repeats, *_cells(mean)]


def _cells(found: Number) -> list[object]:
    value, quantity = found.value, found.quantity
    bounds = (value.mean, value.low, value.high)
    return [
        *(found.layer, quantity.title, quantity.column, quantity.unit),
        *(v if math.isfinite(v) else "" for v in bounds),
        value.n,
        found.null if math.isfinite(found.null) else "",
        "" if not math.isfinite(value.low) else "repeats" if found.repeats > 1 else "run",
    ]

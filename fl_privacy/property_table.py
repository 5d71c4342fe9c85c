"""The scores of property inference on a terminal: a row for the whole update, and one a layer."""

from __future__ import annotations

from rich.table import Table

from fl_privacy.component import parse
from fl_privacy.metrics.auc import CHANCE
from fl_privacy.printable import printable
from fl_privacy.property_rows import counted, scored
from fl_privacy.report import words
from fl_privacy.report.scores import Analysis, set_score
from fl_privacy.results import MetricInfo
from fl_privacy.titled_table import titled_table

WHOLE = "whole update"


def property_table(attack: Analysis, null: Analysis, defense: str | None) -> Table:
    """AUC with its 95 % interval for each layer, beside that of the permuted property."""
    table = titled_table(words.group_title(defense))
    table.caption, table.caption_justify = printable(counts(attack, defense)), "left"
    table.add_column("AUC, 95 % interval", overflow="fold")
    for name in (words.plain(attack.config.name), "property permuted"):
        table.add_column(printable(name), justify="right")
    for metric in set_metrics(attack):
        line = set_score(attack, defense, metric, null)
        cells = (words.interval(v, metric) if v else "" for v in (line.interval, line.guess))
        table.add_row(printable(layer_of(metric)), *map(printable, cells))
    return table


def set_metrics(analysis: Analysis) -> list[MetricInfo]:
    """The metrics that score a set of results as a whole."""
    return [metric for metric in analysis.config.metrics if metric.set_level]


def layer_of(metric: MetricInfo) -> str:
    """The layer that a score is of, or that it is of the whole update."""
    return str(parse(metric.spec)[1].get("layer") or WHOLE)


def counts(attack: Analysis, defense: str | None) -> str:
    """How many batches of how many clients had the property, and what chance would get."""
    found = counted(scored(attack.of(defense), set_metrics(attack)[0].name))
    relation = f"; {attack.config.relation}" if attack.config.relation else ""
    return f"{found}; chance gets {CHANCE}{relation}"

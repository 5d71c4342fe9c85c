"""The tables of the section on layers, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fl_privacy.layer_results import Measurement
from fl_privacy.metrics.correlation import Correlation
from fl_privacy.metrics.statistics import Interval
from fl_privacy.prediction import LayerAuc, Point, predictions
from fl_privacy.report.layer_words import about, columns, heading, spoken
from fl_privacy.report.words import count, plain


def table(found: Measurement) -> dict[str, Any]:
    """One measurement as text."""
    config = found.config
    settings = ", ".join(f"{plain(k)} {v!r}" for k, v in config.settings.items())
    return {
        "title": heading(found),
        "audit": config.source == "audit",
        "columns": columns(found),
        "layers": found.layers,
        "about": about(found),
        "settings": settings or "none",
        "digest": config.digest[:8],
        "recording": config.recording_digest[:8],
        "device": config.device,
        "code": config.code_digest[:8],
        "seconds": f"{found.seconds:,.1f}",
    }


def auc_table(own: Sequence[LayerAuc]) -> dict[str, Any]:
    """One attack, layer by layer, as text."""
    about = f" of {own[0].property}" if own[0].property else ""
    return {
        "title": f"AUC{about} from each layer alone, {plain(own[0].attacker)}",
        "counts": "; ".join(
            dict.fromkeys(str(said) for a in own for said in (a.counts, a.relation) if said)
        ),
        "lines": [
            {
                "layer": a.layer,
                "auc": interval_in_words(a.auc),
                "n": f"{a.counts.having} + {a.counts.lacking}" if a.counts else a.auc.n,
                "null": interval_in_words(a.null) if a.null else "",
            }
            for a in own
        ],
    }


def prediction_table(found: Sequence[Point]) -> list[dict[str, str]]:
    """How well each metric, and each of its columns, predicts the AUC; those that can be told."""
    return [
        {
            "metric": plain(one.metric),
            "column": spoken(one.column),
            "pearson": correlation_in_words(one.pearson),
            "spearman": correlation_in_words(one.spearman),
            "over": over_in_words(one.pearson),
        }
        for one in predictions(found)
    ]


def correlation_in_words(one: Correlation) -> str:
    """Coefficient, interval and p; then the interval over repeats, where there are several."""
    p = "p < 0.001" if one.p < 0.001 else f"p {one.p:.3f}"
    said = f"{interval_in_words(one.interval)}, {p}"
    if one.repeats.n < 2:
        return said
    low, high = (f"{end:.2f}".replace("-", "−") for end in (one.repeats.low, one.repeats.high))
    return f"{said}; over repeats [{low}, {high}]"


def over_in_words(one: Correlation) -> str:
    """``5 layers of 1 network, 20 runs``."""
    layers = f"{count(one.interval.n, 'layer')} of {count(one.networks, 'network')}"
    return f"{layers}, {count(one.repeats.n, 'run')}"


def interval_in_words(value: Interval) -> str:
    """``0.93 [0.85, 0.97]``."""
    if not math.isfinite(value.mean):
        return "–"
    mean = f"{value.mean:.2f}".replace("-", "−")
    if not math.isfinite(value.low):
        return mean
    return f"{mean} [{value.low:.2f}, {value.high:.2f}]".replace("-", "−")

"""Flower's own central differential privacy by name, around a Flower strategy.

McMahan et al., https://arxiv.org/abs/1710.06963; adaptive clipping: Andrew et al.,
https://arxiv.org/abs/1905.03871. The server is trusted: it sees every update before the
noise. Flower's wrappers change replies in place, which is why the recorder is outermost,
and draw from NumPy's unseeded global state, so such a run cannot be repeated.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fl_privacy.component import ComponentError, parse
from strategies.flower import refuse_settings, wrong_settings

_PREFIX = "DifferentialPrivacy"
_GIVEN = ("strategy", "accountant")


def dp_strategies() -> dict[str, type[Strategy]]:
    """``server-side-fixed-clipping`` and the like -> class of each of Flower's DP wrappers."""
    return {
        re.sub(r"(?<!^)(?=[A-Z])", "-", name.removeprefix(_PREFIX)).lower(): getattr(flower, name)
        for name in flower.__all__
        if name.startswith(_PREFIX)
    }


def dp_parameters(cls: type[Strategy]) -> dict[str, Any]:
    """The numbers a wrapper may be told and their defaults (``inspect.Parameter.empty``: none)."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _GIVEN}


def with_differential_privacy(strategy: Strategy, spec: str) -> Strategy:
    """``strategy`` inside the wrapper that ``spec`` names; itself for an empty text.

    Raises:
        ComponentError: no such wrapper, setting or value; the message lists what exists.
    """
    if not spec.strip():
        return strategy
    name, settings = parse(spec)
    table = dp_strategies()
    if name not in table:
        raise ComponentError(f"no dp-strategy {name!r}; there are: {', '.join(sorted(table))}")
    known = dp_parameters(table[name])
    strange = [
        f"{key} has to be a number, got {value!r}"
        for key, value in settings.items()
        if not _is_number(value)
    ]
    refuse_settings(name, known, [*wrong_settings(settings, known), *strange])
    make: Any = table[name]
    try:
        wrapper: Strategy = make(strategy, **settings)
    except ValueError as error:
        raise ComponentError(f"{name}: {error}") from None
    return wrapper


def refuse_statistics(spec: str, buffers: Iterable[str]) -> None:
    """Refuse buffers under Flower's wrappers, which clip and noise them as if they were weights.

    Raises:
        ComponentError: there are ``buffers``, such as batch norm's running variances.
    """
    names = list(dict.fromkeys(name.rpartition(".")[0] or name for name in buffers))
    if spec.strip() and names:
        raise ComponentError(
            f"dp-strategy {parse(spec)[0]} would clip and noise the statistics of "
            f"{', '.join(names)} as if they were weights, and noisy variances become negative; "
            f"choose a model without batch norm, such as one with GroupNorm"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Flower's own strategies by name: ``fedavg``, ``krum(num_malicious_nodes=1)``, and so on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fl_privacy.component import ComponentError, parse

_OURS = ("fraction_", "min_", "weighted_by_", "arrayrecord_", "configrecord_", "train_loss_")


def flower_strategies() -> dict[str, type[FedAvg]]:
    """Lower-case name -> class of every Flower strategy that aggregates weights.

    Left out are those that aggregate trees (FedXgb...) and the differential-privacy
    wrappers, which wrap another strategy.
    """
    classes = (getattr(flower, name) for name in flower.__all__)
    return {
        cls.__name__.lower(): cls
        for cls in classes
        if issubclass(cls, FedAvg) and not cls.__name__.startswith("FedXgb")
    }


def parameters_of(cls: type[FedAvg]) -> dict[str, Any]:
    """The scalars a strategy may be told and their defaults (``inspect.Parameter.empty``: none).

    Sampling, message keys and functions are not among them: the run config sets those.
    """
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(cls).parameters.values()
        if not parameter.name.startswith(_OURS) and "Callable" not in str(parameter.annotation)
    }


def flower_strategy(spec: str, common: Mapping[str, Any]) -> FedAvg:
    """The strategy that ``spec`` names, with its own settings and the ``common`` ones it takes.

    Raises:
        ComponentError: no such strategy or setting; the message lists those that exist.
    """
    name, settings = parse(spec)
    table = flower_strategies()
    if name not in table:
        raise ComponentError(f"no strategy {name!r}; installed: {', '.join(sorted(table))}")
    known = parameters_of(table[name])
    refuse_settings(name, known, wrong_settings(settings, known))
    taken = inspect.signature(table[name]).parameters.keys()
    return table[name](**{k: v for k, v in common.items() if k in taken}, **settings)


def wrong_settings(settings: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Settings that are not ``known``, and known ones without a default that are missing."""
    missing = (k for k, v in known.items() if v is inspect.Parameter.empty and k not in settings)
    return [
        *(f"no setting {key!r}" for key in sorted(settings.keys() - known.keys())),
        *(f"needs {key!r}" for key in sorted(missing)),
    ]


def refuse_settings(name: str, known: Iterable[str], wrong: Sequence[str]) -> None:
    """Refuse the settings of a strategy if something is ``wrong`` with them.

    Raises:
        ComponentError: what is, and the settings that are ``known``.
    """
    if wrong:
        listed = ", ".join(known) or "none"
        raise ComponentError(f"{name}: {'; '.join(wrong)}. Settings of {name}: {listed}")

"""Flower's own strategies, with the settings that those need which have no default."""

from __future__ import annotations

import flwr.serverapp.strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

SETTINGS: dict[str, dict[str, float]] = {
    "Bulyan": {"num_malicious_nodes": 1},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "QFedAvg": {"client_learning_rate": 0.1},
    "FedAvgM": {"server_momentum": 0.9},
    "FedProx": {"proximal_mu": 0.1},
}


def made(name: str, *, clients: int) -> Strategy:
    """A strategy by the name of its class; a wrapper for differential privacy around FedAvg."""
    made_by = getattr(flower, name)
    if not name.startswith("DifferentialPrivacy"):
        return made_by(**SETTINGS.get(name, {}))  # type: ignore[no-any-return]
    fixed = {"clipping_norm": 1.0} if "Fixed" in name else {}
    return made_by(FedAvg(), noise_multiplier=0.5, num_sampled_clients=clients, **fixed)  # type: ignore[no-any-return]

"""The truth vault: what clients really trained on, kept only when a run is an audit.

Clients write it, the scoring reads it; adversaries never get to see it (an import contract
and a test keep it so). Samples lie in
``<root>/<attempt>/<round>/<node>/<step>.safetensors``, the client's defense beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fl_privacy.recording_store import write_atomically
from fl_privacy.types import Exchange, Samples

DEFENSE = "defense.json"


class TruthError(ValueError):
    """There is no usable truth for an exchange; the message names the file and the remedy."""


class TruthVault:
    """Ground truth by attempt, round, node and step.

    Nothing is created until something is written.

    Args:
        root: the ``truth`` folder of a run.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(
        self,
        *,
        attempt: int,
        round: int,
        node: str,
        step: int,
        samples: Samples,
        indices: Tensor,
    ) -> None:
        """Keep the batch of one local step, as a whole or not at all.

        Args:
            attempt: attempt of the recording, as the server told the client.
            round: round of the federation.
            node: the client's node id, letters and digits only.
            step: local step, from 0.
            samples: inputs ``[n, *input_shape]`` in pixel space and labels ``[n]``.
            indices: ``[n]``, which samples of the training split these are.

        Raises:
            TruthError: a bad node or step, or indices that do not fit the samples.
        """
        if indices.shape != samples.labels.shape:
            raise TruthError(
                f"expected one index for each of the {len(samples)} samples, got shape "
                f"{tuple(indices.shape)}"
            )
        if step < 0:
            raise TruthError(f"expected a step of 0 or more, got {step}")
        properties = {f"property{i}": v for i, v in enumerate(samples.properties.values())}
        tensors = {
            "inputs": samples.inputs.float(),
            "labels": samples.labels.long(),
            "indices": indices.long(),
            **properties,
            **({} if samples.people is None else {"people": samples.people.long()}),
        }
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(plain, {"properties": json.dumps(list(samples.properties))})
        self._put(self._folder(attempt, round, node) / f"{step}.safetensors", data)

    def clear(self, *, attempt: int, round: int, node: str) -> None:
        """Remove what a run of the same name left of a round before."""
        for path in self._folder(attempt, round, node).glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def write_defense(
        self, *, attempt: int, round: int, node: str, spec: str, stats: Mapping[str, float]
    ) -> None:
        """Keep which defense a client applied, "" for none, and what it reported."""
        data = json.dumps({"spec": spec, "stats": dict(stats)}).encode()
        self._put(self._folder(attempt, round, node) / DEFENSE, data)

    def has(self, exchange: Exchange) -> bool:
        """Whether the truth behind an exchange was kept."""
        return bool(self._files(exchange))

    def steps(self, exchange: Exchange) -> list[Samples]:
        """The batch of each local step, in order.

        Raises:
            TruthError: none was kept, or a file is damaged.
        """
        return [samples for samples, _ in self._steps(exchange)]

    def samples(self, exchanges: Sequence[Exchange], *, inputs: bool = True) -> Samples:
        """Everything the exchanges were computed on, each sample once, in order of first use.

        Without ``inputs`` these are not read, and ``[n, 0]``.

        Raises:
            TruthError: none was kept for one of them, or a file is damaged.
        """
        seen: set[int] = set()
        parts: list[Samples] = []
        for exchange in exchanges:
            for samples, indices in self._steps(exchange, inputs=inputs):
                fresh = torch.tensor(list(_fresh(indices, seen)), dtype=torch.int64)
                parts.append(samples.take(fresh))
        if not parts:
            raise TruthError("expected at least one exchange, got none")
        return Samples.joined(parts)

    def defense(self, exchange: Exchange) -> str | None:
        """The component spec of the client's defense; empty for none, None if it did not say."""
        return self._defense(exchange)[0]

    def defense_stats(self, exchange: Exchange) -> Mapping[str, float]:
        """What the client's defense reported about this exchange."""
        return self._defense(exchange)[1]

    def defenses(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Defense, empty for none, and what it reported, of every exchange that has it."""
        for path in sorted(self.root.glob(f"*/*/*/{DEFENSE}")):
            yield _read_defense(path)

    def nodes(self) -> dict[int, str]:
        """The node of each partition, as its client wrote it down.

        Raises:
            TruthError: what a client wrote is damaged.
        """
        paths = sorted(self.root.glob(f"*/*/*/{DEFENSE}"))
        told = ((_read_defense(path)[1].get("partition"), path.parent.name) for path in paths)
        return {int(partition): node for partition, node in told if partition is not None}

    def _folder(self, attempt: int, round: int, node: str) -> Path:
        if not (node.isascii() and node.isalnum()):
            raise TruthError(f"expected a node of letters and digits, got {node!r}")
        return self.root / str(int(attempt)) / str(int(round)) / node

    def _put(self, path: Path, data: bytes) -> None:
        try:
            write_atomically([(path, data)])
        except OSError as error:
            raise TruthError(
                f"{path}: cannot be written ({error.strerror}); give a run folder that clients "
                f"can write"
            ) from error

    def _files(self, exchange: Exchange) -> list[Path]:
        folder = self._folder(exchange.attempt, exchange.round, exchange.node)
        files = [path for path in folder.glob("*.safetensors") if path.stem.isdecimal()]
        return sorted(files, key=lambda path: int(path.stem))

    def _steps(
        self, exchange: Exchange, *, inputs: bool = True
    ) -> Iterator[tuple[Samples, list[int]]]:
        files = self._files(exchange)
        if not files:
            raise TruthError(
                f"{self._folder(exchange.attempt, exchange.round, exchange.node)}: no truth was "
                f"kept; run the federation as an audit (audit=true) to score it"
            )
        for path in files:
            yield _read(path, inputs)

    def _defense(self, exchange: Exchange) -> tuple[str | None, dict[str, float]]:
        path = self._folder(exchange.attempt, exchange.round, exchange.node) / DEFENSE
        return _read_defense(path) if path.exists() else (None, {})


def _read_defense(path: Path) -> tuple[str, dict[str, float]]:
    try:
        fields = json.loads(path.read_bytes())
        return str(fields["spec"]), {k: float(v) for k, v in fields["stats"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TruthError(f"{path}: damaged ({error}); repeat the audit") from error


def _read(path: Path, inputs: bool) -> tuple[Samples, list[int]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["properties"])
            properties = {n: file.get_tensor(f"property{i}") for i, n in enumerate(names)}
            people = file.get_tensor("people") if "people" in file.keys() else None  # noqa: SIM118
            labels = file.get_tensor("labels")
            seen = file.get_tensor("inputs") if inputs else torch.empty(len(labels), 0)
            return Samples(seen, labels, properties, people), file.get_tensor("indices").tolist()
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TruthError(f"{path}: damaged ({error}); repeat the audit") from error


def _fresh(indices: Sequence[int], seen: set[int]) -> Iterator[int]:
    """Positions of the indices not seen yet, which are marked as seen."""
    for position, index in enumerate(indices):
        if index not in seen:
            seen.add(index)
            yield position

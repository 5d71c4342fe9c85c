"""What waits is not read yet, what is done is let go: memory is that of one chunk."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adversaries.gradient_matching import GradientMatching
from adversaries.gradient_similarity import GradientSimilarity
from adversaries.matching import Chunk
from adversaries.targets import Target
from fl_privacy.testing import toy_observations
from fl_privacy.types import LazyTensors, Observation, Reconstruction

CPU = torch.device("cpu")
WIDTH = 4


class Watch:
    """Counts what is alive of the things it was shown, now and at most."""

    def __init__(self) -> None:
        self.seen = self.alive = self.most = 0

    def __call__(self, thing: object) -> None:
        weakref.finalize(thing, self._gone)
        self.seen += 1
        self.alive += 1
        self.most = max(self.most, self.alive)

    def _gone(self) -> None:
        self.alive -= 1


def watched(observation: Observation, watch: Watch) -> Observation:
    """An observation whose update is read from somewhere, each time anew, as from a disk."""
    (exchange,) = observation.exchanges
    stored = exchange.update

    def read(name: str) -> Tensor:
        tensor = stored[name].clone()
        watch(tensor)
        return tensor

    lazy = LazyTensors(tuple(stored), read)
    return replace(observation, exchanges=(replace(exchange, update=lazy),))


def test_updates_live_no_longer_than_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, prepared = Watch(), Watch()
    observations = [watched(o, raw) for o in toy_observations(5 * WIDTH)[0]]
    solve = GradientMatching.solve

    def count(
        self: GradientMatching, chunk: Chunk, width: int, **known: object
    ) -> list[Reconstruction]:
        for target in chunk.targets:
            prepared(target)
            for tensor in target.observed[0].values():
                raw(tensor)
        return solve(self, chunk, width, **known)  # type: ignore[arg-type]

    monkeypatch.setattr(GradientMatching, "solve", count)
    attack = GradientSimilarity(iterations=2, width=WIDTH)
    for _ in attack.attack(observations, seed=0, device=CPU):
        pass
    tensors = len(observations[0].exchanges[0].update)
    assert prepared.seen == 5 * WIDTH
    assert prepared.most <= WIDTH
    assert raw.seen >= 2 * 5 * WIDTH * tensors
    assert raw.most <= (WIDTH + 1) * tensors  # those prepared, and one as it was read


def test_results_of_other_targets_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of targets in turn: neither waits until all of the other kind are done."""
    made = Watch()
    plain, _ = toy_observations(10 * WIDTH)
    observations = [
        replace(o, exchanges=(replace(o.exchanges[0], global_digest=str(i % 2)),))
        for i, o in enumerate(plain)
    ]
    solve = GradientMatching.solve

    def count(
        self: GradientMatching, chunk: Chunk, width: int, **known: object
    ) -> list[Reconstruction]:
        results = solve(self, chunk, width, **known)  # type: ignore[arg-type]
        for result in results:
            made(result)
        return results

    monkeypatch.setattr(GradientMatching, "solve", count)
    keys = []
    for result in GradientSimilarity(iterations=1, width=WIDTH).attack(
        observations, seed=0, device=CPU
    ):
        keys.append(result.key)
        del result
    assert keys == [o.key for o in observations]
    assert made.most <= 3 * WIDTH  # of ten times as many


def test_a_target_can_be_watched() -> None:
    """The counts above mean something: what is held is counted, what is dropped is not."""
    watch = Watch()
    held = [Target(str(i), ({},), torch.zeros(1)) for i in range(3)]
    for target in held:
        watch(target)
    del held, target
    watch(Target("last", ({},), torch.zeros(1)))
    assert (watch.seen, watch.most) == (4, 3)

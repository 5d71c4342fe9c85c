"""Analyses of a sweep side by side, in processes of a private Ray, one thread each.

They start when all simulations are done: each Ray has the machine to itself, and no rounds are
timed while attacks run. A process computes the same numbers whatever runs beside it.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.util.queue import Queue

from fl_privacy.plan import resolve_device
from fl_privacy.superlink import signals_ignored
from fl_privacy.sweep.private_ray import private_ray
from fl_privacy.sweep.running import Step, Tools, Watch, trouble

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
"""How long an interrupted analysis has to write its finished targets."""


@dataclass(frozen=True)
class Spread:
    """Does analyses ``workers`` at a time, in the order given."""

    workers: int

    def __call__(
        self, left: Sequence[Step], tools: Tools, watch: Watch, failed: dict[str, str]
    ) -> None:
        """Do them all, as `fl_privacy.sweep.running.in_turn` does.

        Raises:
            RayTimeoutError: Ray did not start in time.
        """
        if left:
            workers = min(self.workers, len(left))
            with private_ray(workers, gpus_for(tools.device)):
                side_by_side(left, tools, watch, failed, workers)


def side_by_side(
    left: Sequence[Step], tools: Tools, watch: Watch, failed: dict[str, str], workers: int
) -> None:
    """Do analyses, ``workers`` at a time, where Ray runs.

    One whose process dies, as when memory runs out, fails and leaves the others; a bug in one
    ends them all. So does an interruption; targets that are finished are written before.
    """
    waiting = deque(left)
    with _crew(tools, watch, workers) as crew:
        while waiting or crew.busy:
            while waiting and len(crew.busy) < workers:
                crew.take(waiting.popleft())
            failed |= crew.ended()


@contextmanager
def _crew(tools: Tools, watch: Watch, workers: int) -> Iterator[Crew]:
    share = gpu_share(workers, gpus_for(tools.device))
    analyze = ray.remote(num_cpus=1, num_gpus=share, max_retries=0)(_analyze)
    crew = Crew(tools, watch, analyze, Queue(actor_options={"num_cpus": 0}))
    try:
        yield crew
    finally:
        with signals_ignored():
            crew.stop()


@dataclass
class Crew:
    """Processes at work: takes steps, passes on what is told of them and how they ended."""

    tools: Tools
    watch: Watch
    analyze: Any
    news: Queue
    busy: dict[int, _Work] = field(default_factory=dict)
    taken: int = 0

    def take(self, step: Step) -> None:
        """Let a process do a step."""
        self.watch.started(step)
        self.taken += 1
        task = self.analyze.remote(step, self.tools, self.taken, self.news)
        self.busy[self.taken] = _Work(step, task, task.future())

    def ended(self) -> dict[str, str]:
        """Wait for a step to end, a moment at most; returns the names of those that failed, why."""
        wait([work.future for work in self.busy.values()], POLL_SECONDS, FIRST_COMPLETED)
        failed = {}
        for number, words in self._told():
            if number in self.busy:
                self.watch.told(self.busy[number].step, words)
        for number in [n for n, work in self.busy.items() if work.future.done()]:
            work = self.busy.pop(number)
            error = _error(work.future)
            self.watch.ended(work.step, time.monotonic() - work.start, error)
            if error:
                failed[work.step.name] = error
        return failed

    def stop(self) -> None:
        """Interrupt what still runs, and give it the time to write what it finished."""
        for work in self.busy.values():
            ray.cancel(work.task)
            self.watch.told(work.step, "stopping")
        wait([work.future for work in self.busy.values()], PATIENCE_SECONDS)

    def _told(self) -> list[tuple[int, str]]:
        """What the processes told since the last time: number of the step, words.

        Through futures: a signal interrupts them with any exception, unlike Ray's own calls.
        """
        actor: Any = self.news.actor
        count = actor.qsize.remote().future().result()
        told: list[tuple[int, str]] = actor.get_nowait_batch.remote(count).future().result()
        return told


@dataclass(frozen=True)
class _Work:
    step: Step
    task: Any
    future: Future[str]
    start: float = field(default_factory=time.monotonic)


def _analyze(step: Step, tools: Tools, number: int, news: Queue) -> str:
    """One step in a process of Ray; returns why it failed, or nothing.

    An interruption has to reach Python even below a shell that ignores it for its jobs.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    return trouble(step, tools, lambda words: news.put_nowait((number, words)))


def _error(future: Future[str]) -> str:
    """Why a step failed, or nothing; a bug in it is raised, with its traceback as the cause."""
    try:
        return future.result()
    except (WorkerCrashedError, OutOfMemoryError) as death:
        reason = "" if isinstance(death, WorkerCrashedError) else " for want of memory"
        return (
            f"its process died{reason}; what it wrote is kept: repeat the command, with fewer "
            f"--workers where memory is short"
        )
    except RayTaskError as error:
        raise error.cause from error


def gpus_for(device: str) -> int:
    """Among how many GPUs analyses are spread: all, or none that Ray chooses when one is named."""
    named = resolve_device(device)
    return torch.cuda.device_count() if named.type == "cuda" and named.index is None else 0


def gpu_share(workers: int, gpus: int) -> float:
    """The share of a GPU that lets ``workers`` run at once, spread evenly."""
    return 1 / -(-workers // gpus) if gpus else 0.0

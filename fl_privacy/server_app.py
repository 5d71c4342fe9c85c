"""The server of the Flower app: honest, curious, and recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import nn

from clients.round_trip import normalization
from clients.training import evaluate_model
from fl_privacy.checkpoint import load_initial_model, load_last_model, save_model
from fl_privacy.claims import most_examples
from fl_privacy.code_digest import code_digest
from fl_privacy.component import create
from fl_privacy.history import add_round, begin_attempt, completed_rounds
from fl_privacy.protocols import Dataset, Model
from fl_privacy.recording import RecordingWriter
from fl_privacy.rounds import parse_rounds
from fl_privacy.run_folder import RunFolder, RunFolderError, writable_run_folder
from fl_privacy.run_manifest import manifest_of
from fl_privacy.seeding import generator
from fl_privacy.settings import RunSettings, parse_settings
from fl_privacy.types import Samples, Task
from strategies.await_clients import AwaitClients
from strategies.decoding import Decoding
from strategies.differential_privacy import refuse_statistics, with_differential_privacy
from strategies.flower import flower_strategy
from strategies.recording import RecordingStrategy
from strategies.require_replies import RequireReplies
from strategies.same_code import SameCode
from strategies.screening import Screening
from strategies.seeded_sampling import SeededSampling
from strategies.sorted_replies import SortedReplies

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and record every update.

    Raises:
        ComponentError, RunFolderError, RecordingError: a setting cannot be used.
        RuntimeError: all clients failed, or run other code.
    """
    settings = parse_settings(context.run_config)
    folder = writable_run_folder(settings.out_dir, resume=settings.resume)
    dataset = cast(Dataset, create("datasets", settings.dataset))
    task = dataset.task()
    model = cast(Model, create("models", settings.model)).build(task, seed=settings.seed)
    refuse_statistics(settings.dp_strategy, (name for name, _ in model.named_buffers()))
    inner = server_strategy(settings)
    manifest = manifest_of(settings, task)
    patient = settings.record_failures == "go-on"
    is_recorded = parse_rounds(settings.record_rounds)
    completed = completed_rounds(folder.history) if settings.resume else []
    with RecordingWriter.open(
        folder.recording,
        manifest,
        resume=settings.resume,
        patient=patient,
        budget=settings.record_bytes,
        completed=[(attempt, round) for attempt, round in completed if is_recorded(round)],
    ) as writer:
        if settings.resume:
            load_last_model(model, folder)
        else:
            load_initial_model(model, settings.initial_model)
            folder.model.unlink(missing_ok=True)
        strategy = RecordingStrategy(
            inner,
            writer,
            rounds=settings.record_rounds,
            max_clients=settings.record_clients,
            model=model,
        )
        strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=settings.num_server_rounds,
            timeout=settings.round_seconds,
            train_config=ConfigRecord({"attempt": writer.attempt, **normalization(task)}),
            evaluate_fn=evaluation(
                model,
                task,
                scored_samples(dataset, settings),
                folder,
                writer.attempt,
                patient=patient,
            ),
        )


def server_strategy(settings: RunSettings) -> Strategy:
    """The Flower strategy of the run and what guards it; everything inside the recorder."""
    common = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "train_loss_key": "loss",
    }
    strategy: Strategy = flower_strategy(settings.strategy, common)
    weighs_by_loss = hasattr(strategy, "train_loss_key")
    strategy = with_differential_privacy(strategy, settings.dp_strategy)
    if settings.fraction_train < 1:
        strategy = SeededSampling(strategy, fraction=settings.fraction_train, seed=settings.seed)
    if settings.sorted_replies:
        strategy = SortedReplies(strategy)
    strategy = AwaitClients(strategy, wanted=settings.min_clients, seconds=settings.wait_seconds)
    strategy = Decoding(RequireReplies(SameCode(strategy, code_digest())))
    return Screening(
        strategy,
        policy=settings.malformed_replies,
        most_examples=most_examples(settings.local_training),
        withheld=() if weighs_by_loss else ("loss",),  # DP-SGD keeps it
    )


def scored_samples(dataset: Dataset, settings: RunSettings) -> Samples:
    """The test samples that score the global model: those the run's seed draws, in order."""
    n = len(dataset.labels("test"))
    draw = torch.randperm(n, generator=generator(settings.seed, "evaluation"))
    return dataset.load("test", draw[: settings.eval_samples or n].sort().values)


def evaluation(
    model: nn.Module,
    task: Task,
    samples: Samples,
    folder: RunFolder,
    attempt: int,
    *,
    patient: bool = False,
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """A function for Flower that keeps the global model, scores it and appends to the history.

    One JSON line a round: attempt, round, accuracy, loss, n (test samples), and seconds
    since this function was made. A ``patient`` one goes on where there is no room for them.
    """
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @contextmanager
    def going_on() -> Iterator[None]:
        try:
            yield
        except (RunFolderError, OSError) as error:
            if not patient:
                raise
            getLogger("flwr").warning("training goes on, its model is not kept: %s", error)

    with going_on():
        begin_attempt(folder.history, attempt)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 0:
            getLogger("flwr").info("Evaluating the initial model: %s test samples", len(samples))
        state, kept = arrays.to_torch_state_dict(), False
        with going_on():
            save_model(folder.model, state, attempt=attempt, round=server_round)
            kept = True
        model.load_state_dict(state)
        loss, accuracy = evaluate_model(model, task, samples, device=device)
        seconds = round(time.perf_counter() - start, 4)
        score = {"accuracy": accuracy, "loss": loss, "n": len(samples), "seconds": seconds}
        with going_on():
            add_round(folder.history, attempt, server_round, score, kept=kept)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    return evaluate

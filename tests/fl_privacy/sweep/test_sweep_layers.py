"""A sweep of layers: attacked, measured, resumed, and on its page; the work itself is invented."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from fl_privacy.datasets.digits import Digits
from fl_privacy.layer_results import (
    FOLDER,
    MeasureConfig,
    Measurement,
    write_measurement,
)
from fl_privacy.layers import LayerMetricError
from fl_privacy.measuring import MeasurePlan
from fl_privacy.plan import Plan
from fl_privacy.recording import Manifest, RecordingWriter
from fl_privacy.results import MetricInfo, ResultConfig, ResultSet, ResultWriter
from fl_privacy.run_folder import RunFolder
from fl_privacy.sweep.command import Request, execute
from fl_privacy.sweep.layer_page import study
from fl_privacy.sweep.layer_runs import layer_runs
from fl_privacy.sweep.layer_table import csv_text
from fl_privacy.sweep.live import Board
from fl_privacy.sweep.running import Told, run_sweep
from fl_privacy.sweep.stages import Stage
from fl_privacy.truth import TruthVault

LAYERS = ("first", "second", "last")
SWEEP = """
title = "Layers"
seeds = [0, 1]
[run]
dataset = "digits"
model = "mlp"
num-server-rounds = 1
client-property = "odd"
[axes]
batch-size = [4, 8]
[defenses.none]
[[attacks]]
adversary = "property_inference(property='{client-property}', layers='each', warm_up={seed})"
name = "PIA"
own-partition = 1
[[measures]]
metrics = ["v_information(property='{client-property}')", "label_sensitivity"]
"""


@dataclass
class Inventing:
    """Invents AUCs that grow with the layer, and V-information of which they are a function."""

    refuse: str = "-"
    device: str = "cpu"
    done: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def simulate(self, stage: Stage, out: Path, told: Told) -> None:
        """Two clients, who write down their partitions."""
        folder, vault = RunFolder(out), TruthVault(RunFolder(out).truth)
        manifest = Manifest(model="mlp", dataset="digits", task=Digits().task())
        with RecordingWriter.open(folder.recording, manifest) as writer:
            _, sent = writer.put_global({"w": np.zeros(2, dtype=np.float32)})
            for partition, node in enumerate(("70", "71")):
                arrays = {"w": np.ones(2, dtype=np.float32)}
                writer.append(round=1, node=node, arrays=arrays, num_examples=1, global_digest=sent)
                where: dict[str, Any] = {"attempt": 1, "round": 1, "node": node}
                vault.write_defense(**where, spec="", stats={"partition": partition})
        folder.model.write_bytes(b"parameters")
        lines = (f'{{"attempt":1,"round":{r},"accuracy":0.5,"loss":1.0,"n":9,"seconds":{r}}}\n'
                 for r in range(2))  # fmt: skip
        folder.history.write_text("".join(lines))
        self.done.append("simulation")

    def attack(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Of four batches that have the property, layer i takes i + 1 apart from all others."""
        self.done.append("attack")
        self.plans.append(plan)
        return self._results(run, plan, permuted=False)

    def guess(self, run: Path, plan: Plan, told: Told) -> ResultSet:
        """Nothing is taken apart."""
        return self._results(run, plan, permuted=True)

    def _results(self, run: Path, plan: Plan, *, permuted: bool) -> ResultSet:
        infos = [MetricInfo(name="auc", spec="auc", unit="share of pairs", set_level=True,
                            higher_is_leakier=True)]  # fmt: skip
        infos += [
            infos[0].model_copy(update={"name": name, "spec": name})
            for name in (f"auc(layer={layer!r})" for layer in LAYERS)
        ]
        config = ResultConfig(
            name="property_inference", adversary=plan.adversary, task=Digits().task(),
            settings={"property": "odd", "permuted": permuted}, seed=plan.seed, device="cpu",
            threat_model=plan.threat_model.model_dump(mode="json"), width=1, recording_digest="",
            metrics=tuple(infos),
        )  # fmt: skip
        folder = RunFolder(run).results / config.folder_name
        told = {"auc": 4, **{f"auc(layer={layer!r})": i + 1 for i, layer in enumerate(LAYERS)}}
        with ResultWriter.open(folder, config) as writer:
            cells: dict[str, Any] = {
                name: ",".join(["1" if i < n and not permuted else "0" for i in range(8)])
                for name, n in told.items()
            }
            rest: dict[str, Any] = {"key": f"k{plan.seed}", "attempt": 1, "round": 8, "node": "70",
                                    "rounds": "1,2,3,4,5,6,7,8", "images": 8, "defense": "",
                                    "status": "completed"}  # fmt: skip
            writer.write_chunk([{**rest, **cells, "has_property": "1,1,1,1,0,0,0,0"}], {})
            writer.finish()
        return ResultSet(folder)

    def measure(self, run: Path, plan: MeasurePlan, told: Told) -> list[Path]:
        """One number a layer, a little more with each seed."""
        (spec,) = plan.metrics
        if spec.startswith(self.refuse):
            raise LayerMetricError(f"{spec}: too few samples")
        self.done.append(spec)
        config = MeasureConfig(
            metric=spec, name=spec.partition("(")[0], settings={}, needs="property",
            source="auxiliary", data="", data_digest="", samples=4, rounds=("1:1",), updates=1,
            targets_digest="", model="mlp", task=Digits().task(), threat_model={}, seed=plan.seed,
            device="cpu", threads=1, recording_digest="", code_digest="", versions={},
        )  # fmt: skip
        values = tuple(i + plan.seed / 10 for i in range(len(LAYERS)))
        found = Measurement(
            config=config, unit="nats", layers=LAYERS, values=values, seconds=0,
            columns={"null": (0.0, 0.1, 0.2)},
        )  # fmt: skip
        write_measurement(run, found)
        return [run / FOLDER / config.file_name]


@pytest.fixture(autouse=True)
def _no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_privacy.sweep.tools.rehearse", lambda *arguments: None)


def run(request: Request, tools: Any) -> dict[str, str]:
    """The sweep without its page."""
    _, cells = request.read()
    failed: dict[str, str] = {}
    run_sweep(cells, tools, Board(cells, Console(file=io.StringIO())), failed)
    return failed


def test_a_sweep_of_layers_and_everything_it_leaves(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    first: Any = Inventing()
    again = Inventing()
    request = request_of(SWEEP)
    assert execute(request, first, Console(file=io.StringIO()))[1] == {}
    assert Counter(first.done) == dict.fromkeys(
        ("simulation", "attack", "v_information(property='odd')", "label_sensitivity"), 4
    )
    assert {plan.threat_model.own_node for plan in first.plans} == {"71"}
    assert {plan.adversary for plan in first.plans} == {
        f"property_inference(property='odd', layers='each', warm_up={seed})" for seed in (0, 1)
    }
    assert run(request, again) == {}
    assert again.done == []
    _check_numbers(request)
    _check_page(request.out)


def _check_numbers(request: Request) -> None:
    rows = list(csv.DictReader((request.out / "layers.csv").open()))
    assert (request.out / "layers.csv").read_text() == csv_text(study(request.read()[1]))
    mine = [row for row in rows if row["group"] == "batch-size 8" and not row["column"]]
    aucs = {r["layer"]: r for r in mine if r["quantity"] == "PIA" and not r["seed"]}
    # a batch with the property is set apart with i + 1 of 4: AUC = (1 + (i + 1) / 4) / 2
    assert {layer: float(row["value"]) for layer, row in aucs.items()} == {
        "whole update": 1.0, "first": 0.625, "second": 0.75, "last": 0.875,
    }  # fmt: skip
    assert {row["null"] for row in aucs.values()} == {"0.5"}
    assert {(row["n"], row["repeats"], row["interval_over"]) for row in aucs.values()} == {
        ("2", "2", "repeats")
    }
    single = next(r for r in mine if r["seed"] == "1" and r["quantity"] == "PIA")
    assert (single["n"], single["interval_over"]) == ("8", "run")
    metric = next(r for r in mine if "v_inf" in r["quantity"] and r["layer"] == "last"
                  and not r["seed"])  # fmt: skip
    assert float(metric["value"]) == pytest.approx(2.05)
    assert float(metric["null"]) == pytest.approx(0.2)
    whole = list(csv.DictReader((request.out / "sweep.csv").open()))
    whole = [row for row in whole if row["metric"] == "auc"]
    assert {(row["adversary"], row["mean"], row["n"]) for row in whole} == {
        ("plain", "1.0", "2"), ("baseline", "0.5", "2"),
    }  # fmt: skip


def _check_page(out: Path) -> None:
    page = (out / "sweep.html").read_text()
    assert "What each layer tells" in page
    assert "property shuffled" in page
    assert "blind guess" not in page
    assert "clients’ images" not in page
    assert page.count("<td>last</td><td>2 of 2 repeats</td>") == 2 * 3
    assert "3 layers of 1 network, 4 runs" in page
    assert "Mo et al., Fig. 1, have" not in page  # a network of no figure of theirs
    names = {path.stem for path in (out / "figures").glob("*.svg")}
    assert names == {
        "along-batch-size", "layers-against-auc", "layers-batch-size-4--none",
        "layers-batch-size-8--none",
    }  # fmt: skip
    for name in names:
        text = (out / "figures" / f"{name}.svg").read_text()
        ElementTree.fromstring(text)
        assert "var(--" not in text
        assert "#0501" not in text  # every stand-in has its color


def test_a_metric_that_refuses_is_named_and_leaves_the_others(
    request_of: Callable[..., Request],
) -> None:
    request, partly = request_of(SWEEP), Inventing(refuse="v_information")
    failed = run(request, partly)
    assert len(failed) == 4
    where, why = next(iter(failed.items()))
    assert "v_information(property='odd')" in where
    assert "too few samples" in why
    assert Counter(partly.done)["label_sensitivity"] == 4
    mended = Inventing()
    assert run(request, mended) == {}
    assert mended.done == ["v_information(property='odd')"] * 4


def test_a_sweep_may_measure_and_attack_nobody(request_of: Callable[..., Request]) -> None:
    start, _, rest = SWEEP.partition("[[attacks]]")
    request = request_of(start + rest[rest.index("[[measures]]") :])
    assert run(request, Inventing()) == {}
    repeats = layer_runs(request.read()[1])
    assert [(repeat.aucs, len(repeat.measured)) for repeat in repeats] == [((), 2)] * 4
    told = [quantity.title for quantity in study(request.read()[1])[0].table]
    assert list(dict.fromkeys(told)) == ["v_information, auxiliary", "label_sensitivity, auxiliary"]


def test_a_client_that_is_not_there_is_no_adversary(request_of: Callable[..., Request]) -> None:
    failed = run(request_of(SWEEP.replace("own-partition = 1", "own-partition = 5")), Inventing())
    assert len(failed) == 4
    assert all("held that partition; there are: 0, 1" in why for why in failed.values())

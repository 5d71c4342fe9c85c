"""fl-privacy measure: metrics at recorded global models, on whose samples, refused or resumed."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from fl_privacy import cli, component
from fl_privacy.component import Component, ComponentError
from fl_privacy.datasets import npz
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.properties import PropertyError
from fl_privacy.layer_data import samples_of_file
from fl_privacy.layer_results import FOLDER, LayerResultError, Measurement, measurements
from fl_privacy.layers import LayerMetricError, weight_layers, weight_of
from fl_privacy.measure_command import Measured, measure_all
from fl_privacy.measuring import MeasurePlan
from fl_privacy.plan import AnalysisError
from fl_privacy.property_facts import PropertyFacts
from fl_privacy.protocols import Progress, silent
from fl_privacy.report.layer_words import about
from fl_privacy.testing.toys import TASK
from fl_privacy.truth import TruthVault
from fl_privacy.types import LayerScores, Observation, Samples

MODEL = "fl_privacy.testing:toy_model"
CALLS: list[tuple[int, Samples | None]] = []


def layers_of(observations: Sequence[Observation]) -> tuple[str, ...]:
    return weight_layers(observations[0].model(), observations[0].task)


class Norm(Component):
    """Mean norm of each layer's recorded update, times ``scale``; with all kinds of columns."""

    needs: ClassVar[Literal["updates"]] = "updates"
    scale: float = 1.0

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores:
        CALLS.append((len(observations), samples))
        layers = layers_of(observations)
        exchanges = [o.exchanges[0] for o in observations]
        norms = torch.tensor([[e.update[weight_of(n)].norm() for n in layers] for e in exchanges])
        progress(1, 1)
        odd = torch.tensor([math.nan, math.inf])
        return LayerScores(
            "norm", "weight units", layers, self.scale * norms.mean(0), norms.std(0),
            n=len(observations), columns={"<b>odd</b>": odd},
        )  # fmt: skip


class Share(Component):
    """The share of samples with a property, for each layer."""

    needs: ClassVar[Literal["property"]] = "property"
    property: str = ""

    def measure(
        self,
        observations: Sequence[Observation],
        samples: Samples | None,
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> LayerScores:
        CALLS.append((len(observations), samples))
        assert samples is not None
        layers = layers_of(observations)
        share = float(samples.properties[self.property].float().mean())
        values = torch.full((len(layers),), share)
        return LayerScores("share", "share", layers, values, n=len(samples))


class Fussy(Norm):
    """Refuses."""

    def measure(self, observations: object, samples: object, **_: object) -> LayerScores:
        raise LayerMetricError("expected noise, got none: defend with noise")


class Broken(Norm):
    """Gives one value too few."""

    def measure(self, observations: Sequence[Observation], *_: object, **__: object) -> LayerScores:
        return LayerScores("broken", "1", layers_of(observations), torch.zeros(1))


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = {kind.__name__.lower(): f"{__name__}:{kind.__name__}" for kind in (Norm, Share)}
    install(monkeypatch, kinds)
    CALLS.clear()
    yield
    component.installed.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str]) -> None:
    monkeypatch.setitem(component.BUILT_IN, "layer_metrics", kinds)
    component.installed.cache_clear()
    monkeypatch.setattr(component, "entry_points", lambda group: [])


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """40 samples of 10 people, half of them smiling, all with glasses; even: given by the task."""
    path = tmp_path / "people.npz"
    np.savez(
        path,
        inputs=np.random.default_rng(0).random((40, 6, 6), dtype=np.float32),
        labels=np.arange(40) % 4,
        smiling=np.arange(40) // 20,
        glasses=np.ones(40, dtype=int),
        even=np.arange(40) % 2,
        people=np.arange(40) // 4,
        names=np.array(["not", "a", "property"]),
    )
    return path


def measured(run: Path, plan: MeasurePlan) -> list[Measured]:
    return list(measure_all(run, plan, model=MODEL))


def found(run: Path, plan: MeasurePlan) -> list[Measurement]:
    return [one.found for one in measured(run, plan) if one.found]


def texts(every: Sequence[Measurement]) -> list[str]:
    return [one.model_dump_json() for one in every]


def test_the_last_recorded_global_model_is_measured(run: Path) -> None:
    (one,) = found(run, MeasurePlan())
    assert (one.config.metric, one.config.rounds, one.config.updates) == ("norm", ("1:2",), 3)
    assert one.layers == ("1", "3")
    assert one.config.source == "none"
    assert CALLS == [(3, None)]


def test_each_round_is_measured_alone_or_all_together(run: Path) -> None:
    apart = found(run, MeasurePlan(rounds="1-2"))
    assert [one.config.rounds for one in apart] == [("1:1",), ("1:2",)]
    (both,) = found(run, MeasurePlan(rounds="1-2", together=True))
    assert both.config.rounds == ("1:1", "1:2")
    mean = torch.tensor([one.values for one in apart]).mean(0)
    assert torch.allclose(torch.tensor(both.values), mean)


def test_without_a_name_all_that_the_data_allows_is_measured(run: Path, people: Path) -> None:
    every = measured(run, MeasurePlan(auxiliary=str(people)))
    specs = {one.spec: one for one in every}
    named = {f"share(property='{name}')" for name in ("smiling", "glasses", "even")}
    assert set(specs) == {"norm", *named}
    smiling = specs["share(property='smiling')"].found
    assert smiling is not None
    assert smiling.values == (0.5, 0.5)
    assert (smiling.config.source, smiling.config.samples) == ("auxiliary", 40)
    refused = specs["share(property='glasses')"]
    assert refused.found is None
    assert "40 with, 0 without" in refused.why
    assert "'even' is the main task" in specs["share(property='even')"].why
    assert (smiling.config.relation, about(smiling).count("phi")) == (
        PropertyFacts(name="smiling", phi=0.0, n=40),
        1,
    )


def test_a_file_holds_samples_properties_and_people(people: Path) -> None:
    samples = samples_of_file(people)
    assert len(samples) == 40
    assert set(samples.properties) == {"smiling", "glasses", "even"}
    assert samples.people is not None
    counts = torch.bincount(samples.people)
    assert counts.tolist() == [4] * 10
    first = samples.people < 5
    assert torch.equal(samples.properties["smiling"], (~first).long())


def test_a_dataset_of_the_threat_model_is_used(run: Path, tmp_path: Path) -> None:
    arrays = {f"{n}_{s}": a for s in ("train", "test") for n, a in pictures().items()}
    np.savez(tmp_path / "own.npz", **arrays)  # type: ignore[arg-type]
    spec = f"npz(path='{tmp_path / 'own.npz'}', properties=('smiling_{{split}}',))"
    granted = MeasurePlan().threat_model.model_copy(update={"auxiliary": spec})
    (one,) = found(run, MeasurePlan(metrics=("share",), threat_model=granted))
    assert one.config.about == "smiling"  # the only property there is
    assert spec in one.config.data


def pictures() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    x, y = random.random((8, 6, 6), dtype=np.float32), np.arange(8) % 4
    return {"x": x, "y": y, "smiling": np.arange(8) // 4}


def test_an_audit_measures_on_the_clients_own_samples(
    tmp_path: Path, record: Callable[..., Path]
) -> None:
    run = record(tmp_path, [(1, "a"), (2, "a"), (2, "b")])
    shutil.rmtree(run / "truth")
    vault = TruthVault(run / "truth")
    for i, (number, node) in enumerate([(1, "a"), (2, "a"), (2, "b")]):
        has = {"smiling": torch.tensor([1 if node == "b" else 0])}
        own = Samples(torch.rand(1, *TASK.input_shape), torch.tensor([i]), has)
        at = torch.tensor([i])
        vault.write(attempt=1, round=number, node=node, step=0, samples=own, indices=at)
    (one,) = found(run, MeasurePlan(metrics=("share",), audit=True))
    assert one.values == (0.5, 0.5)  # of a and b in round 2, without what a held in round 1
    assert (one.config.source, one.config.samples) == ("audit", 2)


@pytest.mark.parametrize(
    ("plan", "error", "said"),
    [
        ({"metrics": ("share",)}, AnalysisError, "--audit"),
        ({"metrics": ("nope",)}, ComponentError, "installed: norm, share"),
        ({"metrics": ("norm(size=1)",)}, ComponentError, "Settings of norm: scale"),
        ({"audit": True, "auxiliary": "digits"}, AnalysisError, "both"),
        ({"auxiliary": "nope.npz"}, DatasetError, "no such file"),
        ({"auxiliary": "fashion-mini"}, ValueError, "(1, 6, 6)"),
        ({"rounds": "7"}, ValueError, "in rounds 7"),
        ({"audit": True, "metrics": ("share",)}, PropertyError, "no property in the clients"),
    ],
)
def test_refusals_come_before_any_work(
    run: Path, plan: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as refused:
        measured(run, MeasurePlan.model_validate(plan))
    assert said in str(refused.value)
    assert not CALLS
    assert not (run / FOLDER).exists()


def test_an_unknown_property_lists_those_there_are(run: Path, people: Path) -> None:
    plan = MeasurePlan(metrics=("share(property='smilling')",), auxiliary=str(people))
    with pytest.raises(
        PropertyError, match=r"did you mean 'smiling'.* one of even, glasses, smiling"
    ):
        measured(run, plan)


def test_an_audit_needs_a_truth(run: Path) -> None:
    shutil.rmtree(run / "truth")
    with pytest.raises(AnalysisError, match="--audit needs the truth"):
        measured(run, MeasurePlan(audit=True))


def test_a_file_of_other_inputs_is_refused(run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=np.zeros((9, 5, 5)), labels=np.arange(9) % 4)
    with pytest.raises(AnalysisError, match=r"expected inputs of shape \(1, 6, 6\)"):
        measured(run, MeasurePlan(auxiliary=str(tmp_path / "x.npz")))


def test_what_is_measured_is_not_measured_again(run: Path, people: Path) -> None:
    plan = MeasurePlan(auxiliary=str(people))
    first, calls = found(run, plan), len(CALLS)
    again = measured(run, plan)
    assert texts([one.found for one in again if one.found]) == texts(first)
    assert all(one.held for one in again if one.found)
    assert len(CALLS) == calls
    next((run / FOLDER).glob("share-*")).unlink()
    resumed = [one for one in measured(run, plan) if one.found and not one.held]
    assert [one.spec for one in resumed] == ["share(property='smiling')"]


@pytest.mark.parametrize("change", ["seed", "data", "settings", "rounds"])
def test_another_configuration_is_another_measurement(run: Path, people: Path, change: str) -> None:
    plan = MeasurePlan(metrics=("share(property='smiling')",), auxiliary=str(people))
    found(run, plan)
    if change == "data":
        with np.load(people) as file:
            held = dict(file)
        np.savez(people, **{**held, "smiling": held["smiling"][::-1]})
        npz._splits.cache_clear()
    other: dict[str, dict[str, object]] = {
        "seed": {"seed": 1},
        "data": {},
        "settings": {"metrics": ("norm(scale=2.0)",)},
        "rounds": {"rounds": "1"},
    }
    found(run, plan.model_copy(update=other[change]))
    assert len(measurements(run)) == 2
    assert len(CALLS) == 2


def test_a_measurement_is_read_back_as_it_was(run: Path) -> None:
    (one,) = found(run, MeasurePlan())
    (held,) = measurements(run)
    assert texts([held]) == texts([one])
    odd = held.columns["<b>odd</b>"]
    assert math.isnan(odd[0])
    assert odd[1] == math.inf
    (file,) = (run / FOLDER).iterdir()
    assert file.name == f"norm-{one.config.digest[:8]}.json"
    assert file.stat().st_mode & 0o077 == 0  # the owner's alone


def test_a_damaged_measurement_is_named(run: Path) -> None:
    found(run, MeasurePlan())
    (file,) = (run / FOLDER).iterdir()
    file.write_text(file.read_text()[:-40])
    with pytest.raises(LayerResultError, match="remove it and repeat fl-privacy measure"):
        measured(run, MeasurePlan())


def test_a_metric_that_refuses_is_left_out_unless_it_was_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {"fussy": f"{__name__}:Fussy", "norm": f"{__name__}:Norm"})
    left, one = measured(run, MeasurePlan())
    assert left.why == "expected noise, got none: defend with noise"
    assert one.found is not None
    with pytest.raises(LayerMetricError, match="expected noise"):
        measured(run, MeasurePlan(metrics=("fussy",)))


def test_a_metric_that_breaks_its_protocol_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {"broken": f"{__name__}:Broken"})
    with pytest.raises(LayerResultError, match="values: expected 2 numbers, one a layer, got 1"):
        measured(run, MeasurePlan())
    assert not measurements(run)


def test_the_command_shows_a_row_a_layer_and_its_bar(
    run: Path, people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["measure", str(run), "--auxiliary", str(people), "--model", MODEL]
    monkeypatch.setattr(sys, "argv", ["fl-privacy", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    out, err = capsys.readouterr()
    assert "share of smiling, round 2" in out
    assert "<b>odd</b>" in out
    assert "40 samples" in " ".join(out.split())
    assert "Not measured: share(property='glasses')" in " ".join(err.split())
    assert "2/2" in err
    config = json.loads(next((run / FOLDER).glob("norm-*")).read_text())["config"]
    assert len(config["recording_digest"]) == len(config["code_digest"]) == 64

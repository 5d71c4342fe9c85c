import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_privacy.exchanges import aggregate
from fl_privacy.recording import Layout, Manifest, Recording, RecordingError, RecordingWriter
from fl_privacy.rounds import RoundsError
from fl_privacy.testing import toy_model, toy_observations
from fl_privacy.testing.toys import TASK, TRAINING
from fl_privacy.threat_model import (
    ThreatModel,
    ThreatModelError,
    check_requirements,
)

ROOT = Path(__file__).parents[2]
COUNTS = {"7": 3, "8": 1}


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """Two clients, three rounds; client c in round r adds r + 10 c to every weight."""
    model = toy_model()
    layout = Layout.of(model)
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    training = TRAINING.model_copy(update={"batch_size": 3})
    manifest = Manifest(created="", task=TASK, local_training=training)
    with RecordingWriter.open(tmp_path / "recording", manifest) as writer:
        _, sent = writer.put_global(state, layout)
        for round in (1, 2, 3):
            for node, count in COUNTS.items():
                writer.append(
                    round=round,
                    node=node,
                    arrays={n: a + round + 10 * int(node) for n, a in state.items()},
                    num_examples=count,
                    global_digest=sent,
                    layout=layout,
                )
        writer.append(
            round=3, node="9", arrays=None, num_examples=None, global_digest="", status="error: x"
        )
    yield Recording(tmp_path / "recording")


def test_default_grants_local_training_and_nothing_else(recording: Recording) -> None:
    observations = ThreatModel().observe(recording, model=toy_model)
    assert len(observations) == 6
    for o in observations:
        assert o.local_training == recording.manifest.local_training
        assert [o.labels, o.auxiliary, o.own_update, o.defense] == [None] * 4
    assert len({o.key for o in observations}) == 6


def test_update_is_returned_minus_sent(recording: Recording) -> None:
    first = ThreatModel().observe(recording, model=toy_model)[0].exchanges[0]
    for update in first.update.values():
        torch.testing.assert_close(update, torch.full_like(update, 71.0), rtol=1e-5, atol=0)


def test_unit_client_links_the_rounds_of_each_client(recording: Recording) -> None:
    observations = ThreatModel(unit="client").observe(recording, model=toy_model)
    assert [[(e.node, e.round) for e in o.exchanges] for o in observations] == [
        [("7", 1), ("7", 2), ("7", 3)],
        [("8", 1), ("8", 2), ("8", 3)],
    ]


def test_unit_aggregate_is_the_weighted_mean_in_float64(recording: Recording) -> None:
    observations = ThreatModel(unit="aggregate").observe(recording, model=toy_model)
    assert [o.exchanges[0].round for o in observations] == [1, 2, 3]
    (exchange,) = observations[1].exchanges
    assert exchange.node == "7+8"
    assert exchange.num_examples == 4
    for update in exchange.update.values():
        assert update.dtype == torch.float64
        expected = torch.full_like(update, (3 * 72 + 1 * 82) / 4)
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=0)


def test_an_aggregate_with_an_unknown_count_is_flawed(recording: Recording) -> None:
    (exchange,) = ThreatModel().observe(recording, model=toy_model)[0].exchanges
    mean = aggregate([exchange, replace(exchange, num_examples=None)])
    assert "num-examples" in mean.flaw
    assert mean.num_examples is None


def test_rounds_select_and_an_empty_selection_is_refused(recording: Recording) -> None:
    observations = ThreatModel().observe(recording, model=toy_model, rounds="2-")
    assert [o.exchanges[0].round for o in observations] == [2, 2, 3, 3]
    with pytest.raises(ThreatModelError, match="no update to observe in rounds 7"):
        ThreatModel().observe(recording, model=toy_model, rounds="7")
    with pytest.raises(RoundsError):
        ThreatModel().observe(recording, model=toy_model, rounds="two")


def test_withheld_layers_by_name_or_prefix(recording: Recording) -> None:
    hidden = ThreatModel(withheld=("1", "3.bias")).observe(recording, model=toy_model)[0].withheld
    assert hidden == ("1.weight", "1.bias", "3.bias")
    with pytest.raises(ThreatModelError, match=r"'conv'.*1\.weight"):
        ThreatModel(withheld=("conv",)).observe(recording, model=toy_model)


def test_a_model_that_does_not_fit_is_named_by_its_first_tensor(recording: Recording) -> None:
    def wider() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(36, 99), torch.nn.Sigmoid(), torch.nn.Linear(99, 4)
        )

    with pytest.raises(RecordingError, match=r"1\.weight.*\(99, 36\).*\(16, 36\)"):
        ThreatModel().observe(recording, model=wider)


def test_what_the_recording_lacks_is_asked_for(tmp_path: Path, recording: Recording) -> None:
    with pytest.raises(ThreatModelError, match=r"--model package\.module:factory"):
        ThreatModel().observe(recording)
    with RecordingWriter.open(tmp_path / "bare", Manifest(created="", model="gone")):
        pass
    with pytest.raises(ThreatModelError, match="--task"):
        ThreatModel().observe(Recording(tmp_path / "bare"))
    with pytest.raises(ThreatModelError, match=r"'gone'.*installed:.*lenet-zhu"):
        ThreatModel().observe(Recording(tmp_path / "bare"), task=TASK)


def test_oracle_labels_need_an_audit(recording: Recording) -> None:
    told = ThreatModel(labels="oracle")
    with pytest.raises(ThreatModelError, match="audit"):
        told.observe(recording, model=toy_model)
    observations = told.observe(
        recording, model=toy_model, oracle=lambda e: torch.tensor([int(e.node)])
    )
    assert [o.labels.tolist() for o in observations if o.labels is not None][:2] == [[7], [8]]
    assert told.oracles == ("labels",)


def test_an_oracle_is_not_consulted_unless_granted(recording: Recording) -> None:
    def never(_: object) -> torch.Tensor:
        raise AssertionError("the oracle was asked")

    assert ThreatModel().observe(recording, model=toy_model, oracle=never)


@pytest.mark.parametrize("field", ["labels", "local_training", "auxiliary", "own_update"])
def test_refusal_names_the_field_and_the_setting_that_grants_it(field: str) -> None:
    observation = replace(toy_observations(1)[0][0], local_training=None)
    with pytest.raises(ThreatModelError, match=rf"mine needs {field}.*set "):
        check_requirements({field}, observation, ThreatModel(local_training=False), "mine")


def test_training_that_the_recording_does_not_name_is_asked_for_in_a_line_to_copy() -> None:
    observation = replace(toy_observations(1)[0][0], local_training=None)
    with pytest.raises(ThreatModelError, match="recording does not name") as refused:
        check_requirements({"local_training"}, observation, ThreatModel(), "mine")
    _, _, line = str(refused.value).partition("--threat-model: ")
    assert ThreatModel.model_validate(tomllib.loads(line)).training is not None


def test_only_the_threat_model_makes_observations() -> None:
    makers = [
        path.relative_to(ROOT).as_posix()
        for package in ("fl_privacy", "strategies", "clients", "adversaries")
        for path in (ROOT / package).rglob("*.py")
        if " Observation(" in path.read_text().replace("class Observation(", "")
    ]
    assert makers == ["fl_privacy/threat_model.py"]

"""One odd reply costs one target, never the analysis."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adversaries.baseline import Baseline
from adversaries.gradient_similarity import GradientSimilarity
from fl_privacy.recording import Layout, Manifest, Recording, RecordingError, RecordingWriter
from fl_privacy.recording_format import MISSED
from fl_privacy.recording_refusals import Refusal, file_of
from fl_privacy.testing import toy_model
from fl_privacy.testing.toys import TASK, TRAINING
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import Failure, Observation, Reconstruction

CPU = torch.device("cpu")
Arrays = dict[str, np.ndarray[Any, Any]]


def observed(tmp_path: Path, hostile: Arrays | None, examples: int = 1) -> list[Observation]:
    """Three clients of one round; the second sends ``hostile``, or a good reply."""
    model = toy_model()
    layout = Layout.of(model)
    state: Arrays = {n: t.numpy() for n, t in model.state_dict().items()}
    manifest = Manifest(created="", task=TASK, local_training=TRAINING)
    rng = np.random.default_rng(0)
    with RecordingWriter.open(tmp_path / "recording", manifest) as writer:
        _, sent = writer.put_global(state, layout)
        for node in range(3):
            good = {
                n: (a + 0.01 * rng.normal(size=a.shape)).astype(np.float32)
                for n, a in state.items()
            }
            odd = node == 1
            writer.append(
                round=1,
                node=str(node),
                arrays=hostile if odd and hostile is not None else good,
                num_examples=examples if odd else 1,
                global_digest=sent,
                layout=layout,
            )
    return ThreatModel().observe(Recording(tmp_path / "recording"), model=toy_model)


def state() -> Arrays:
    return {n: t.numpy() for n, t in toy_model().state_dict().items()}


@pytest.mark.parametrize(
    ("hostile", "examples", "reason"),
    [
        ({"evil": np.zeros(3)}, 1, "does not fit the model"),
        ({**state(), "3.bias": np.zeros(99, np.float32)}, 1, r"'3.bias'.*\(4,\).*\(99,\)"),
        ({**state(), "3.bias": np.zeros(4, bool)}, 1, "'3.bias' in a type"),
        (None, 2**62, "claims 4611686018427387904 examples: expected 1 to 1"),
        (None, -1, "claims -1 examples"),
        (state(), 1, "zero everywhere"),
    ],
)
def test_an_odd_reply_is_a_failure_of_its_own(
    tmp_path: Path, hostile: Arrays | None, examples: int, reason: str
) -> None:
    observations = observed(tmp_path, hostile, examples)
    attack = GradientSimilarity(iterations=2)
    first, odd, last = attack.attack(observations, seed=0, device=CPU)
    assert isinstance(first, Reconstruction)
    assert isinstance(last, Reconstruction)
    assert isinstance(odd, Failure)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(odd.reason)
    assert len(list(Baseline().attack(observations, seed=0, device=CPU))) == 3


def test_a_frozen_parameter_is_a_constant_that_an_update_tells_nothing_of(tmp_path: Path) -> None:
    def partly_frozen() -> torch.nn.Module:
        model = toy_model()
        first, *_ = model.parameters()
        first.requires_grad_(False)
        return model

    observed(tmp_path, None)
    (name, first), *others = toy_model().named_parameters()
    target, *_ = ThreatModel().observe(Recording(tmp_path / "recording"), model=partly_frozen)
    (exchange,) = target.exchanges
    assert set(exchange.update) == set(exchange.parameters) == {n for n, _ in others}
    assert torch.equal(exchange.buffers[name], first)
    assert name in target.history[0].buffers


def test_the_aggregate_with_an_odd_reply_fails_with_its_reason(tmp_path: Path) -> None:
    observed(tmp_path, {"evil": np.zeros(3)})
    (mean,) = ThreatModel(unit="aggregate").observe(
        Recording(tmp_path / "recording"), model=toy_model
    )
    (result,) = GradientSimilarity(iterations=2).attack([mean], seed=0, device=CPU)
    assert isinstance(result, Failure)
    assert "does not fit the model" in result.reason


def test_the_aggregate_is_without_what_the_server_kept_out_of_it(tmp_path: Path) -> None:
    observed(tmp_path, {"evil": np.zeros(3)})
    path = tmp_path / "recording"
    evil = next(entry for entry in Recording(path).entries() if entry.node == "1")
    refusal = Refusal(attempt=1, round=1, n=evil.n, node="1", reason="it does not fit")
    name, data = file_of([refusal])
    (path / name).parent.mkdir()
    (path / name).write_bytes(data)
    (mean,) = ThreatModel(unit="aggregate").observe(Recording(path), model=toy_model)
    assert mean.exchanges[0].node == "0+2"
    single = ThreatModel().observe(Recording(path), model=toy_model)
    assert len(single) == 3, "who sees each reply sees that one, too"


def test_the_aggregate_of_a_round_that_is_not_whole_fails_with_its_reason(tmp_path: Path) -> None:
    observed(tmp_path, None)
    index = tmp_path / "recording/index/000000.jsonl"
    first, *others = index.read_text().splitlines()
    gone = json.loads(first) | {"file": "", "bytes": 0, "sha256": "", "schema": ""}
    path = tmp_path / "recording"

    def means(status: str, sent: str, own_node: str = "") -> Observation:
        line = json.dumps(gone | {"status": status, "global": sent})
        index.write_text("\n".join([line, *others, ""]))
        granted = ThreatModel(unit="aggregate", own_node=own_node)
        (mean,) = granted.observe(Recording(path), model=toy_model)
        return mean

    full = f"{MISSED}: no space left"
    (mean,) = means(full, "").exchanges
    assert mean.flaw.startswith("1 of the round's replies could not be recorded")
    assert not mean.update
    assert not means(full, gone["global"]).exchanges[0].flaw, "a client's own words"
    assert not means("error: it ran out of memory", "").exchanges[0].flaw, "was never in the sum"
    assert not means(full, "", own_node="0").exchanges[0].flaw
    refusal = Refusal(attempt=1, round=1, n=gone["n"], node="0", reason="it does not fit")
    name, data = file_of([refusal])
    (path / name).parent.mkdir()
    (path / name).write_bytes(data)
    assert not means(full, "").exchanges[0].flaw


def test_the_adversarys_own_node_is_no_target_and_its_update_is_known(tmp_path: Path) -> None:
    observed(tmp_path, None)
    targets = ThreatModel(own_node="2").observe(Recording(tmp_path / "recording"), model=toy_model)
    assert [t.exchanges[0].node for t in targets] == ["0", "1"]
    assert all(t.own_update is not None for t in targets)


def test_a_wrong_model_is_still_refused_as_a_whole(tmp_path: Path) -> None:
    observed(tmp_path, None)
    with pytest.raises(RecordingError, match="the model"):
        ThreatModel().observe(
            Recording(tmp_path / "recording"), model=lambda: torch.nn.Linear(36, 4)
        )


def test_a_damaged_update_fails_alone_and_is_named(tmp_path: Path) -> None:
    observations = observed(tmp_path, None)
    files = sorted((tmp_path / "recording" / "updates").rglob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-10])
    attack = GradientSimilarity(iterations=2)
    first, damaged, last = attack.attack(observations, seed=0, device=CPU)
    assert isinstance(first, Reconstruction)
    assert isinstance(last, Reconstruction)
    assert isinstance(damaged, Failure)
    assert files[1].name in damaged.reason

"""The truth vault: what is written comes back, and nothing else does."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from fl_privacy.truth import TruthError, TruthVault
from fl_privacy.types import Exchange, Samples


def exchange(round: int = 1, node: str = "42", attempt: int = 1) -> Exchange:
    return Exchange(
        attempt=attempt,
        round=round,
        node=node,
        num_examples=None,
        digest="",
        global_digest="",
        parameters={},
        buffers={},
        update={},
        returned_buffers={},
    )


def batch(indices: list[int]) -> Samples:
    """Samples whose pixels and labels spell their index."""
    index = torch.tensor(indices)
    inputs = index.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 100
    return Samples(
        inputs, index % 10, {"age": index * 2, "odd/../name": index % 2 == 1}, index // 2
    )


def write(vault: TruthVault, indices: list[int], round: int = 1, step: int = 0) -> None:
    vault.write(
        attempt=1,
        round=round,
        node="42",
        step=step,
        samples=batch(indices),
        indices=torch.tensor(indices),
    )


def test_steps_come_back_in_order_bit_for_bit(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path / "truth")
    for step in (10, 2, 0):
        write(vault, [step, step + 50], step=step)
    steps = vault.steps(exchange())
    assert [int(s.inputs[0, 0, 0, 0] * 100 + 0.5) for s in steps] == [0, 2, 10]
    expected = batch([2, 52])
    assert torch.equal(steps[1].inputs, expected.inputs)
    assert torch.equal(steps[1].labels, expected.labels)
    assert steps[1].inputs.dtype == torch.float32
    assert list(steps[1].properties) == list(expected.properties)
    assert all(torch.equal(steps[1].properties[k], v) for k, v in expected.properties.items())
    assert steps[1].people is not None and steps[1].people.tolist() == [1, 26]


def test_each_sample_counts_once_in_order_of_first_use(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path)
    write(vault, [5, 3], step=0)
    write(vault, [3, 9, 9], step=1)
    write(vault, [9, 1, 5], round=2)
    found = vault.samples([exchange(1), exchange(2)])
    assert (found.properties["age"] / 2).tolist() == [5, 3, 9, 1]
    assert found.people is not None and found.people.tolist() == [2, 1, 4, 0]
    assert found.inputs.shape == (4, 1, 2, 2)
    assert found.labels.tolist() == [5, 3, 9, 1]
    bare = vault.samples([exchange(1), exchange(2)], inputs=False)
    assert bare.inputs.shape == (4, 0)
    assert torch.equal(bare.labels, found.labels)
    assert bare.people is not None and torch.equal(bare.people, found.people)
    assert all(torch.equal(bare.properties[k], v) for k, v in found.properties.items())


def test_no_truth_says_that_the_run_has_to_be_an_audit(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path / "truth")
    assert not vault.has(exchange())
    for read in (vault.steps, lambda e: vault.samples([e])):
        with pytest.raises(TruthError, match="audit=true"):
            read(exchange())
    assert not (tmp_path / "truth").exists()
    write(vault, [1])
    assert vault.has(exchange())
    with pytest.raises(TruthError, match=r"truth/1/2/42.*audit=true"):
        vault.samples([exchange(1), exchange(2)])


def test_attempts_rounds_and_nodes_are_kept_apart(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path)
    write(vault, [1])
    for other in (exchange(attempt=2), exchange(round=2), exchange(node="43")):
        assert not vault.has(other)


@pytest.mark.parametrize("node", ["..", "../x", "a/b", "", "a b", "ä", ".", "a\x00"])
def test_a_node_never_leaves_its_folder(node: str, tmp_path: Path) -> None:
    vault = TruthVault(tmp_path / "truth")
    index = torch.tensor([1])
    with pytest.raises(TruthError, match="letters and digits"):
        vault.write(attempt=1, round=1, node=node, step=0, samples=batch([1]), indices=index)
    with pytest.raises(TruthError, match="letters and digits"):
        vault.write_defense(attempt=1, round=1, node=node, spec="", stats={})
    with pytest.raises(TruthError, match="letters and digits"):
        vault.has(exchange(node=node))
    assert list(tmp_path.iterdir()) == []


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path / "truth")
    write(vault, [1])
    for path in [tmp_path / "truth", *(tmp_path / "truth").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_the_defense_is_kept_beside_the_samples(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path)
    write(vault, [1])
    assert vault.defense(exchange()) is None
    vault.write_defense(attempt=1, round=1, node="42", spec="", stats={})
    assert vault.defense(exchange()) == ""
    vault.write_defense(attempt=1, round=1, node="42", spec="noise(scale=1)", stats={"norm": 2.5})
    assert vault.defense(exchange()) == "noise(scale=1)"
    assert vault.defense_stats(exchange()) == {"norm": 2.5}
    assert len(vault.steps(exchange())) == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path)
    write(vault, [1])
    path = tmp_path / "1/1/42/0.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TruthError, match=r"1/1/42/0\.safetensors: damaged"):
        vault.steps(exchange())
    (tmp_path / "1/1/42/defense.json").write_text("{")
    with pytest.raises(TruthError, match=r"defense\.json: damaged"):
        vault.defense(exchange())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    vault = TruthVault(tmp_path)
    with pytest.raises(TruthError, match="one index for each of the 1 samples"):
        vault.write(
            attempt=1, round=1, node="1", step=0, samples=batch([1]), indices=torch.arange(2)
        )
    with pytest.raises(TruthError, match="step of 0 or more, got -1"):
        write(vault, [1], step=-1)
    (tmp_path / "file").touch()
    with pytest.raises(TruthError, match="cannot be written"):
        write(TruthVault(tmp_path / "file"), [1])

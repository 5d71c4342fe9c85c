"""Sweep files: what they say, what is refused, and what their points are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fl_privacy.component import ComponentError
from fl_privacy.sweep.grid import Sweep, slug
from fl_privacy.sweep.reading import SweepError, changed, merged, read_sweep, sweep_of
from fl_privacy.sweep.stages import cells_of

DOCS = Path(__file__).parents[3] / "docs" / "sweeps"
NOISE = {"spec": "gaussian_noise(scale={strength})", "strengths": [0.1, 1]}
FILE = """
seeds = [0, 1]
reference = "noise"
[run]
dataset = "digits"
model = "mlp"
[train]
clients = 3
num_server_rounds = 7
[record]
fraction-train = 0.5
[axes]
local-epochs = [1, 5]
[defenses.none]
[defenses.noise]
spec = "gaussian_noise(scale={strength})"
strengths = [0.1, 1]
[[attacks]]
adversary = "analytic"
[full]
seeds = [0, 1, 2]
[full.train]
num-server-rounds = 100
[full.defenses.noise]
strengths = [0.1, 0.2, 1]
"""


def document(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"run": {"dataset": "digits"}, "train": {}, "defenses": {"a": {}}}
    return {**base, **changes}


def written(tmp_path: Path, text: str = FILE) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


def test_points_are_the_product_of_axes_defenses_and_strengths(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path))
    assert [point.name for point in sweep.points()] == [
        *("local-epochs-1--none", "local-epochs-1--noise-0.1", "local-epochs-1--noise-1"),
        *("local-epochs-5--none", "local-epochs-5--noise-0.1", "local-epochs-5--noise-1"),
    ]
    assert sweep.points()[1].spec == "gaussian_noise(scale=0.1)"
    cells = cells_of(sweep, tmp_path)
    assert len(cells) == 2 * len(sweep.points())
    train, record = cells[-1].train, cells[-1].record
    assert train is not None
    assert record is not None
    assert train.settings["client-defense"] == "gaussian_noise(scale=1)"
    assert train.settings["local-epochs"] == 5
    assert train.settings["seed"] == 1
    assert train.settings["record-rounds"] == "1,7"
    assert (train.clients, record.clients) == (3, 10)
    assert record.settings["audit"] is True
    assert record.settings["fraction-train"] == 0.5


def test_full_and_set_change_the_file(tmp_path: Path) -> None:
    pairs = ["lr=0.5", "train.clients=4", "train.num_server_rounds=9"]
    small = read_sweep(written(tmp_path), pairs=pairs)
    assert small.run["lr"] == "0.5"
    assert small.train == {"clients": 4, "num-server-rounds": "9"}
    full = read_sweep(written(tmp_path), full=True)
    assert (full.seeds, (full.train or {})["num-server-rounds"]) == ((0, 1, 2), 100)
    assert full.defenses["noise"].strengths == (0.1, 0.2, 1)
    assert full.defenses["noise"].spec == small.defenses["noise"].spec
    with pytest.raises(SweepError, match="KEY=VALUE"):
        changed({}, ["lr"])
    with pytest.raises(SweepError, match=r"no table \[full\]"):
        read_sweep(written(tmp_path, FILE.partition("[full]")[0]), full=True)
    assert merged({"a": {"x": 1, "y": [1]}, "b": 1}, {"a": {"y": [2]}, "c": 3}) == {
        "a": {"x": 1, "y": [2]},
        "b": 1,
        "c": 3,
    }


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"defence": {}}, "no setting 'defence', did you mean 'defenses'"),
        ({"defenses": {"a": {"sped": "x"}}}, "defenses.a: no setting 'sped', did you mean 'spec'"),
        ({"attacks": [{"adversary": "dlg", "adaptve": True}]}, "did you mean 'adaptive'"),
        ({"attacks": [{"adversary": "dlg", "threat_model": {"untt": 1}}]}, "did you mean 'unit'"),
        ({"run": {"learning_rate": 1}}, "no setting 'learning-rate'"),
        ({"run": {"lrr": 1}}, "did you mean 'lr'"),
        ({"train": {"lr": -1}}, "greater than 0"),
        ({"train": {"seed": 3}}, "seed is not set here: the list seeds"),
        ({"train": {"client_defense": "x"}}, r"\[defenses.NAME\]"),
        ({"train": {"clients": 0}}, "above 0"),
        ({"train": {"from-trained": True}}, r"belongs in \[record\]"),
        ({"train": None}, "nothing to do"),
        ({"record": {}}, r"add an \[\[attacks\]\]"),
        ({"seeds": []}, "at least 1 item"),
        ({"reference": "b"}, "is no defense of this file; there are: a"),
        ({"defenses": {}}, "at least 1 item"),
        ({"defenses": {"a": {"spec": "x({strength})"}}}, "go together"),
        ({"defenses": {"a": {"strengths": [1]}}}, "go together"),
        ({"defenses": {"a": {**NOISE, "strengths": [1, 1]}}}, "each once"),
        ({"defenses": {"a": {**NOISE, "strengths": [[1]]}}}, "strengths"),
        ({"defenses": {"a": {}, "A": {}}}, "two points called 'a'"),
        ({"attacks": [{"adversary": "dlg"}, {"adversary": "dlg(inner=2)"}]}, "called 'dlg'"),
        ({"axes": {"lr": [0.1, 0.1]}}, "each once"),
        ({"axes": {"lrr": [0.1]}}, "did you mean 'lr'"),
        ({"axes": {"lr": [0.1]}, "train": {"lr": 1}}, "cannot be in"),
    ],
)
def test_refusals_name_what_is_wrong(tables: dict[str, Any], message: str) -> None:
    changes = {k: v for k, v in document(**tables).items() if v is not None}
    with pytest.raises(ComponentError, match=message):
        sweep_of(changes)


def test_a_mistake_in_full_is_found_without_it(tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match="did you mean 'lr'"):
        read_sweep(written(tmp_path, FILE + "[full.run]\nlrr = 1\n"))


@pytest.mark.parametrize("text", ["a/b", "../..", "", ".", "a b", "ü", "x" * 300, "-", "a\nb"])
def test_slugs_are_single_safe_names(text: str) -> None:
    name = slug(text)
    assert name
    assert len(name) <= 48
    assert not name.startswith((".", "-"))
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_different_texts_have_different_slugs() -> None:
    texts = ["a b", "a-b", "a/b", "a.b", "A b", "a  b", "x" * 99, "x" * 98, "iid", "iid()"]
    assert len({slug(text).casefold() for text in texts}) == len(texts)
    assert slug("0.1") == "0.1"


def test_one_run_serves_both_purposes_when_settings_agree(tmp_path: Path) -> None:
    sweep = sweep_of(document(attacks=[{"adversary": "analytic"}]))
    (cell,) = cells_of(sweep, tmp_path)
    assert len(cell.stages) == 1
    assert cell.train is cell.record
    assert cell.stages[0].settings["audit"] is True
    assert "record-rounds" not in cell.stages[0].settings


def test_folders_follow_the_settings_and_nothing_else(tmp_path: Path) -> None:
    def train(**tables: Any) -> Path:
        (cell,) = cells_of(sweep_of(document(**tables)), tmp_path)
        assert cell.train is not None
        return cell.train.folder

    assert train() == train(title="another", attacks=[{"adversary": "dlg"}], record={"lr": 1})
    assert train() == train(run={"dataset": "digits", "lr": 0.01})
    assert len({train(), train(train={"lr": 1}), train(train={"clients": 11})}) == 3


def test_a_recording_from_the_trained_model_depends_on_the_training(tmp_path: Path) -> None:
    def record(lr: float) -> Any:
        tables = document(
            attacks=[{"adversary": "analytic"}], train={"lr": lr}, record={"from_trained": True}
        )
        (cell,) = cells_of(sweep_of(tables), tmp_path)
        return cell.record

    assert record(0.1).folder != record(0.2).folder
    assert record(0.1).config["initial-model"].endswith("model.safetensors")
    with pytest.raises(ComponentError, match=r"needs a table \[train\]"):
        sweep_of({"defenses": {"a": {}}, "attacks": [{"adversary": "analytic"}],
                  "record": {"from-trained": True}})  # fmt: skip


def test_a_sweep_needs_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="expected a TOML file"):
        read_sweep(tmp_path / "missing.toml")
    with pytest.raises(SweepError, match="expected a TOML file"):
        read_sweep(written(tmp_path, "[run"))


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.toml")), ids=lambda p: p.stem)
def test_the_files_that_come_with_the_project_are_sweeps(path: Path) -> None:
    for full in (False, True) if "[full" in path.read_text() else (False,):
        sweep = read_sweep(path, full=full)
        assert isinstance(sweep, Sweep)
        assert not sweep.reference or sweep.reference in sweep.defenses
        assert cells_of(sweep, path.parent)  # every text can be filled in at every point


def test_a_wrong_value_is_named_without_the_whole_table(tmp_path: Path) -> None:
    with pytest.raises(ComponentError) as refused:
        read_sweep(written(tmp_path), pairs=["lr=fast"])
    assert "lr" in str(refused.value)
    assert "'fast'" in str(refused.value)
    assert "{" not in str(refused.value)

"""The scripts behind table 1 and figure 3 of Soteria: what counts once, what is matched."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adversaries.dlg import DLG
from fl_privacy.component import create
from fl_privacy.protocols import Partition

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a script; its dataclasses look for it among the modules."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_a_client_counts_once_however_often_it_took_part(
    script: Callable[[str], ModuleType],
) -> None:
    table = script("quality_table1")
    rows = [{"node": "a", "x": 1.0}] * 3 + [{"node": "b", "x": 0.0}, {"node": "c", "x": None}]
    found = table.over_clients(rows, "x")
    assert (found.mean, found.n) == (0.5, 2)
    labels = torch.arange(10).repeat_interleave(500)
    for setting in table.SETTINGS.values():
        share: Partition = create("partitions", setting.partition)
        own = labels[share.indices(labels, 3, 100, seed=0)]
        assert len(own) == 40
        assert set(torch.bincount(own).tolist()) - {0} == {40 // setting.classes}


def test_three_parts_of_a_gradient_are_matched_by_one_attack(
    script: Callable[[str], ModuleType],
) -> None:
    parts = script("quality_fig3").parts("dlg(iterations=3)", "representation")
    whole, convolutions, representation = (create("adversaries", s) for s in parts.values())
    assert whole == DLG(iterations=3)
    assert convolutions == DLG(iterations=3, layers="convolutions")
    assert representation == create("adversaries", "representation")

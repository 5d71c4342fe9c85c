"""The page, the figures and the table of a sweep hold what was measured."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from fl_privacy.metrics.images import MSE
from fl_privacy.metrics.statistics import Interval
from fl_privacy.sweep.command import Request, execute
from fl_privacy.sweep.figures import utility_figure
from fl_privacy.sweep.labels import Label, place
from fl_privacy.sweep.live import Board, Clock, clock
from fl_privacy.sweep.offline import Attack
from fl_privacy.sweep.page import adversaries
from fl_privacy.sweep.paper import SERIES, colored, standalone
from fl_privacy.sweep.results import Adversary, Attacked, Measured, measure, round_seconds
from fl_privacy.sweep.same_accuracy import plain, ratios, strongest
from fl_privacy.sweep.table import cost, digits, undefended, who

TARGETS = 3


@pytest.fixture
def swept(request_of: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A whole sweep of two seeds."""
    monkeypatch.setattr("fl_privacy.sweep.tools.rehearse", lambda *arguments: None)
    request: Request = request_of()
    request.file.write_text("seeds = [0, 1]\n" + request.file.read_text())
    execute(request, tools(targets=TARGETS), Console(file=io.StringIO()))
    return request


def test_everything_a_sweep_leaves(swept: Request) -> None:
    _, cells = swept.read()
    found = measure(cells)
    page = (swept.out / "sweep.html").read_text()
    _check_page(page)
    _check_csv(swept.out / "sweep.csv", found)
    _check_figures(swept.out / "figures", found)
    _check_costs(found)
    _check_board(swept, found)


def test_the_strongest_is_that_of_the_clients_that_all_scored() -> None:
    """One that fails on the hard targets is no stronger for it."""

    def adversary(label: str, errors: list[float | None]) -> Adversary:
        rows = [{"attempt": 1, "node": str(i), "mse": e} for i, e in enumerate(errors)]
        result = SimpleNamespace(rows=lambda: rows, config=SimpleNamespace(metrics=[MSE]))
        return Adversary(label, (result,), ())  # type: ignore[arg-type]

    def strongest_of(*errors: list[float | None]) -> str:
        made = tuple(adversary(str(i), own) for i, own in enumerate(errors))
        return Attacked(Attack(adversary="analytic"), made, None).strongest.label

    assert strongest_of([0.1, 0.2, 0.3, 0.8], [0.2, 0.3, 0.4, None]) == "0"
    assert strongest_of([0.1, 0.2, 0.3, 0.8], [0.05, 0.1, 0.4, None]) == "1"
    assert strongest_of([0.1, 0.2, 0.3, 0.8], [0.0, None, None, None]) == "0", "scored too few"
    assert strongest_of([None, None], [None, None]) == "0"


def _check_page(page: str) -> None:
    assert "Two &lt;defenses&gt;" in page
    assert "&lt;b&gt;clip" in page
    assert "<b>clip" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert page.count("<svg") == 4
    assert "2 seeds" in page
    assert "strongest of 2: told" in page
    assert page.count(" (2): plain; told</li>") == 1, "undefended"
    left_out = "impossible (it needs &lt;several&gt; rounds); hopeless (no target has a label)"
    assert page.count(f" (2): plain; told. Not tried: {left_out}</li>") == 2
    assert "met fewer adversaries" not in page
    assert "blind guess" in page
    assert page.count(" reports norm ") == 3, "and nothing undefended"
    assert "gaussian_noise(scale=0.2) reports norm 0.40</small>" in page  # 0.2 times 1, 2, 3
    assert "upload 496 bytes (× 1.19)" in page


def _check_csv(path: Path, found: list[Measured]) -> None:
    rows = list(csv.DictReader(path.open()))
    mine = [
        r for r in rows if (r["defense"], r["strength"], r["metric"]) == ("noise", "0.2", "mse")
    ]
    errors = {row["adversary"]: float(row["mean"]) for row in mine}
    assert errors.keys() == {"plain", "told", "baseline"}
    assert errors["told"] == pytest.approx(errors["plain"] / 2)
    assert [row["n"] for row in mine] == [str(2 * TARGETS)] * 3
    assert [row["adversary"] for row in mine if row["strongest"]] == ["told"]
    assert len({(r["defense"], r["strength"]) for r in rows}) == len(found)


def _check_figures(folder: Path, found: list[Measured]) -> None:
    names = {path.name for path in folder.glob("*.svg")}
    assert {"training.svg", "utility-analytic.svg", "strip-analytic-noise.svg"} < names
    assert len(names) == 4
    for path in folder.glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(--" not in path.read_text()
    utility = (folder / "utility-analytic.svg").read_text()
    for label in ("none", "noise", "&lt;b&gt;clip", "blind guess", "plain adversary"):
        assert f"{label}</text>" in utility, label
    assert "strongest adversary" in utility
    # a marker for each point in each of two panels, and one more in the legend
    drawn = str(utility_figure(found, "analytic", ["none", "noise", "<b>clip"], "", "u"))
    for i, defense in enumerate(["none", "noise", "<b>clip"]):
        points = sum(m.point.defense == defense for m in found)
        markers = re.findall(rf"<use [^>]*stroke: var\(--series-{i}\)", drawn)
        assert len(markers) == 2 * points + 1, defense


def _check_costs(found: list[Measured]) -> None:
    free = undefended(found, "")
    assert free is found[0]
    line = cost(found[2], free)
    assert line.accuracy.startswith("69.5 % [")  # 0.9 - 0.2 and 0.01 less for seed 1
    assert line.change == "−20.0 points"
    assert line.seconds == "5.00 s"  # rounds end at 10 + r², so the later ones take 3, 5, 7
    assert line.seconds_ratio == "× 1.00"
    assert cost(free, free).change == ""
    _, cells = found[0], found[0].round_seconds
    assert cells == (3.0, 5.0, 7.0) * 2
    known = ratios(found, "noise", "analytic", plain)
    assert {(r.strength, r.rival) for r in known} == {("0.1", "<b>clip"), ("0.2", "<b>clip")}
    assert all(r.crossing.error for r in known)
    for one, other in zip(known, ratios(found, "noise", "analytic", strongest), strict=True):
        assert one.ratio == pytest.approx(other.ratio)


def _check_board(swept: Request, found: list[Measured]) -> None:
    console = Console(file=io.StringIO(), width=200, height=40)
    _, cells = swept.read()
    board = Board(cells, console)
    console.print(board.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for measured in found:
        assert measured.point.name in shown
    assert shown.count("done") == len(found)
    assert "0 steps left" in shown


def test_the_time_that_is_left_is_known_once_every_kind_was_timed() -> None:
    timer = Clock({"train": 2, "record": 1, "attack": 0})
    assert timer.remaining is None
    timer.ended("train", 10.0)
    assert timer.remaining is None
    assert timer.words == "2 steps left"
    timer.ended("record", 4.0)
    assert timer.remaining == 10.0
    assert timer.words == "1 step left, about 0:10"
    assert clock(3723) == "1:02:03"
    assert clock(63) == "1:03"


def test_small_numbers_keep_two_digits() -> None:
    assert [digits(v) for v in (0.00012345, 0.05, 1.26, 34.6, 0.0, -0.0011, 1.2e-9)] == [
        *("0.00012", "0.050", "1.3", "35", "0", "−0.0011", "1.2e−09")
    ]


def test_an_interval_that_reaches_zero_points_to_the_edge(swept: Request) -> None:
    found = measure(swept.read()[1])
    names = ["none", "noise", "<b>clip"]
    before = str(utility_figure(found, "analytic", names, "", "u"))
    wide = replace(found[1].attacks[0].plain, results=found[1].attacks[0].plain.results)
    object.__setattr__(wide, "interval", lambda metric: Interval(0.05, -0.01, 0.11, 3))
    attacked = replace(found[1].attacks[0], adversaries=(wide,))
    changed = [found[0], replace(found[1], attacks=(attacked,)), *found[2:]]
    after = str(utility_figure(changed, "analytic", names, "", "u"))
    markers = [len(re.findall(r"<use [^>]*stroke: var\(--series-1\)", t)) for t in (before, after)]
    assert markers[1] == markers[0] + 2  # an arrow in each panel


def test_labels_lie_neither_on_each_other_nor_on_points() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot(xlim=(0, 10), ylim=(0, 10))
    axes.plot([1.0], [1.0])
    figure.draw_without_rendering()
    dots = [(5.0, 5.0 + 0.01 * i) for i in range(6)] + [(8.0, 8.0)]
    place(axes, [Label(f"0.00{i}", x, y, "k") for i, (x, y) in enumerate(dots)], dots)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts][-1] == "0.006"
    assert 2 <= len(boxes) < len(dots)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    where = axes.transData.transform(dots)
    assert not any(box.contains(*dot) for box in boxes for dot in where)


def test_a_file_of_its_own_has_its_own_colors() -> None:
    from markupsafe import Markup

    figure = Markup(f'<svg viewBox="0 0 10 20" class="f"><path fill="{SERIES[0]}"/></svg>')
    assert "var(--series-0)" in colored(figure)
    text = standalone(colored(figure))
    assert 'fill="#b4420f"' in text
    ElementTree.fromstring(text)


def test_the_only_round_is_timed_where_there_is_no_other(request_of: Any, tools: Any) -> None:
    request = request_of()
    _, cells = request.read()
    stage = cells[0].record
    assert stage is not None
    stage.perform(lambda out: tools().simulate(stage, out, print))
    assert round_seconds(stage) == [1.0]


def test_a_point_that_met_fewer_adversaries_is_named(swept: Request) -> None:
    found = measure(swept.read()[1])
    alone = replace(found[0].attacks[0], adversaries=found[0].attacks[0].adversaries[:1])
    tried = adversaries([replace(found[0], attacks=(alone,)), *found[1:]], "", "analytic")
    assert tried is not None
    assert (tried["fewer"], tried["most"]) == (["none"], 2)
    assert tried["lines"][0] == {"defense": "none", "labels": ["plain"], "skipped": []}
    assert next(who(alone))[0] == "plain, and no other"

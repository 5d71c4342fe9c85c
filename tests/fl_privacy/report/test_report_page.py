"""The page: what it says, for every state a run folder can be in."""

from __future__ import annotations

import json
import re
import shlex
import stat
import tomllib
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from fl_privacy.report import ReportError, write_report
from fl_privacy.report.reading import read_run
from fl_privacy.report.scores import baseline_of
from fl_privacy.results import ResultConfig
from fl_privacy.threat_model import ThreatModel
from fl_privacy.types import LocalTraining, Samples, Task

EVIL = "<script>alert(1)</script>\"'&$x$"
MakeRun = Callable[..., Any]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, name: str) -> list[str]:
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def read(run: Path, **options: int) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


def exact(i: int, target: Any) -> Tensor:
    inputs: Tensor = target.truth.inputs
    return inputs


def near(i: int, target: Any) -> Tensor:
    noise = torch.randn(target.truth.inputs.shape, generator=torch.Generator().manual_seed(i))
    inputs: Tensor = target.truth.inputs + (0.5 if target.defense else 0.05) * noise
    return inputs


def gray(i: int, target: Any) -> Tensor:
    return torch.full_like(target.truth.inputs, 0.4)


def test_headline_tables_and_pictures_of_a_defended_audit(synthetic_run: MakeRun) -> None:
    run = synthetic_run(clients=4, rounds=2)
    run.add_results("gradient_similarity", near)
    run.add_results("baseline", gray)
    page = read(run.path)
    assert "The updates leaked: +" in page.words
    assert "clients defended by gaussian_noise(scale=0.1)" in page.words
    assert "The attacked batches hold one image each" in page.words
    assert "Labels were inferred, not given." in page.words
    assert "ORACLE" not in page.words
    assert "4 of 4" in page.words
    assert len(page.values("img", "src")) == 8 * 3
    assert all(v.startswith("data:image/png;base64,") for v in page.values("img", "src"))
    assert all(page.values("img", "alt"))


CONSTANT: dict[str, Any] = {
    "adversary": "baseline(guess='constant')",
    "settings": {"guess": "constant"},
}


@pytest.mark.parametrize("mean_first", [True, False])
def test_of_several_guesses_the_mean_image_is_the_baseline(
    synthetic_run: MakeRun, mean_first: bool
) -> None:
    def dark(i: int, target: Any) -> Tensor:
        return torch.zeros_like(target.truth.inputs)

    def some(i: int, target: Any) -> Tensor | str:
        return gray(i, target) if i % 2 else "not attacked"

    run = synthetic_run()
    run.add_results("gradient_similarity", near)
    guesses: list[tuple[Any, dict[str, Any]]] = [
        (some, {"adversary": "baseline(guess='mean')", "settings": {"guess": "mean"}}),
        (dark, CONSTANT),
    ]
    for guess, how in guesses if mean_first else guesses[::-1]:
        run.add_results("baseline", guess, **how)
    found = read_run(run.path).analyses
    (attack,) = [a for a in found if not a.is_baseline]
    assert [a.config.adversary for a in found if a.is_baseline] == [
        "baseline(guess='constant')",
        "baseline(guess='mean')",
    ]
    chosen = baseline_of(attack, found)
    assert chosen is not None
    assert chosen.config.adversary == "baseline(guess='mean')"
    page = read(run.path)
    assert page.words.count("(guess='mean') · the baseline of the gains") == 2  # one a group
    assert page.words.count("the baseline of the gains") == 2
    assert "fl-privacy attack" in page.words
    assert "--adversary 'baseline(guess='\"'\"'constant'\"'\"')'" in page.words
    assert "guessed a constant picture" not in page.words


def test_one_guess_needs_no_mark_and_more_scores_are_in_the_command(
    synthetic_run: MakeRun,
) -> None:
    run = synthetic_run()
    folder = run.add_results("gradient_similarity", near)
    run.add_results("baseline", gray)
    config = json.loads((folder / "config.json").read_text())
    spec = "identifiability(gallery='digits', size=30)"
    share = {"name": "identifiability", "unit": "share of images", "higher_is_leakier": True}
    config["metrics"].append({**share, "spec": spec})
    (folder / "config.json").write_text(json.dumps(config))
    for chunk in (folder / "chunks").glob("*.parquet"):
        table = pq.read_table(chunk)
        column = pa.array([1.0] * len(table), pa.float64())
        pq.write_table(table.append_column("identifiability", column), chunk)
    page = read(run.path)
    assert "the baseline of the gains" not in page.words
    assert "identifiability share of images, higher leaks more gallery 'digits', size 30" in (
        " ".join(re.sub("<[^>]*>", " ", unescape(page.html)).split())
    )
    assert "--metric identifiability" in page.words


def test_asks_no_other_host_and_runs_no_script(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", near)
    page = read(run.path)
    (policy,) = [v for v in page.values("meta", "content") if "default-src" in v]
    assert "default-src 'none'" in policy
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "srcset"}:
            assert value.startswith(("data:", "#"))
        assert not name.startswith("on")
    assert not re.findall(r"@import|url\((?!#)", page.html)


def test_hostile_strings_are_text(synthetic_run: MakeRun) -> None:
    data = Samples(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    task = Task(input_shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.5,), class_names=(EVIL, "b"))
    run = synthetic_run(audit=False, node=EVIL + "{}", lost=EVIL, data=data, task=task, model=EVIL)
    run.add_results("evil", near, adversary=EVIL)
    run.add_results("worse", lambda i, target: EVIL, defense=EVIL)
    run.add_results("scored", near, defense=EVIL)
    page = read(run.path)
    assert "script" not in page.tags
    assert page.html.lower().count("<script") == 0
    assert page.text.count("<script>alert(1)</script>") > 8
    assert all("<script" not in v or EVIL in v for _, _, v in page.attributes)


def test_an_oracle_is_marked_loudly_everywhere_it_scored(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("analytic", exact, oracle=("labels",))
    run.add_results("baseline", gray)
    page = read(run.path)
    assert "ORACLE: at least one adversary was told the true labels" in page.words
    assert "It was told the true labels (an oracle, no real server)." in page.words
    assert "ORACLE: told the true labels" in page.words
    attacks = page.values("figure", "class").count("attack")
    assert page.text.count("ORACLE") - page.text.count("ORACLE:") == attacks == 8


def test_the_headline_prefers_an_attack_without_an_oracle(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("analytic", exact, oracle=("labels",))
    run.add_results("gradient_similarity", near)
    page = read(run.path)
    assert "the server (gradient_similarity, the only attack without an oracle)" in page.words


def test_pictures_are_the_first_by_key_whatever_they_scored(synthetic_run: MakeRun) -> None:
    run = synthetic_run(clients=6, rounds=2, defense="")
    run.add_results("gradient_similarity", near)
    good = read(run.path, pictures=3)
    kept = [v for v in good.values("img", "alt") if v.startswith("truth")]
    first = sorted(run.targets, key=lambda target: target.key)[:3]
    assert kept == [f"truth, class {int(target.truth.labels[0])}" for target in first]
    for folder in (run.path / "results").iterdir():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    run.add_results("gradient_similarity", gray)
    bad = read(run.path, pictures=3)
    assert [v for v in bad.values("img", "alt") if v.startswith("truth")] == kept
    assert "the first 3 images of each group in the order of the targets" in bad.words


def test_pictures_are_scored_in_the_range_of_the_task(synthetic_run: MakeRun) -> None:
    data = Samples(torch.full((8, 1, 8, 8), -0.2), torch.zeros(8, dtype=torch.int64))
    task = Task(input_shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.5,), low=-1.0, high=1.0)
    run = synthetic_run(data=data, task=task)
    run.add_results("gradient_similarity", lambda i, t: torch.full_like(t.truth.inputs, -1.0))
    alts = [v for v in read(run.path).values("img", "alt") if not v.startswith("truth")]
    assert len(alts) == 8
    assert all(alt.endswith("PSNR 8.0 dB") for alt in alts)  # -20 log10 0.4


def test_every_score_carries_what_it_takes_to_read_it(synthetic_run: MakeRun) -> None:
    """Invariant 7: unit, direction, n, interval, baseline; seed and digests of its analysis."""
    run = synthetic_run()
    run.add_results("gradient_similarity", near)
    run.add_results("analytic", near, oracle=("labels",))
    run.add_results("baseline", gray)
    page = read(run.path)
    provenance = {
        unescape(name): facts
        for name, facts in re.findall(r"<section><h3>(.*?)</h3><dl>(.*?)</dl>", page.html)
    }
    interval = r".*\d(\xa0dB)? \[.*\d,\xa0.*\d\]$"
    lines = 0
    for body in re.findall(r"<tbody[^>]*>(.*?)</tbody>", page.html, re.DOTALL):
        who = re.findall(r'scope="rowgroup"[^>]*>(.*?)(?: <span|</th>)', body)
        for row in re.findall(r'<tr><th scope="row">(.*?)</tr>', body) if who else []:
            lines += 1
            assert re.match(r".+<small>.+, (higher|lower) leaks more</small>", row)
            cells = dict(re.findall(r'<td data-label="(.*?)">(.*?)</td>', row))
            assert re.match(interval, cells["mean [95 %]"])
            assert cells["scored"] == "4 of 4"
            if who != ["baseline"]:
                assert re.match(interval, cells["baseline"])
                assert re.match(interval, cells["gain over baseline"])
            for term in ("seed", "configuration digest", "recording digest", "code digest"):
                assert re.search(rf"<dt>{term}</dt><dd>\w+</dd>", provenance[who[0]]), term
    assert lines == 2 * 3 * 4  # groups, adversaries, metrics


def test_the_guess_is_that_on_the_same_targets(synthetic_run: MakeRun) -> None:
    run = synthetic_run(clients=4, rounds=2, defense="")
    run.add_results("baseline", lambda i, t: exact(i, t) if i >= 4 else gray(i, t))
    whole = run.targets
    run.targets = whole[:4]
    run.add_results("gradient_similarity", near)
    page = read(run.path)
    found = re.search(r"guessing without looking at any update gets ([\d.]+)", page.words)
    assert found is not None
    assert float(found[1]) < 20  # the exact guesses are of targets that were not attacked
    assert "on the same 4 targets" in page.words


def test_a_constant_guess_is_told(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", near)
    folder = run.add_results("baseline", gray)
    assert "guessed a constant picture" not in read(run.path).words
    config = json.loads((folder / "config.json").read_text())
    config["threat_model"]["auxiliary"] = ""
    (folder / "config.json").write_text(json.dumps(config))
    assert "baseline guessed a constant picture" in read(run.path).words


def test_the_budget_is_told(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", near, settings={"iterations": 300, "restarts": 2})
    said = "Budget: iterations 300, restarts 2; 4.0 s on cpu for 8 targets."
    assert said in read(run.path).words


def test_aggregates_of_recorded_clients_only_are_told(synthetic_run: MakeRun) -> None:
    run = synthetic_run(limit=3)
    run.add_results("gradient_similarity", near, unit="aggregate")
    assert "the weighted mean of a round's recorded updates" in unescape(read(run.path).words)


def test_a_page_that_cannot_be_written_is_named(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    (run.path / "report.html").mkdir()
    with pytest.raises(ReportError, match=r"report\.html: cannot be written"):
        write_report(run.path)


def test_attempts_have_curves_of_their_own(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    lines = [
        {"attempt": a, "round": r, "accuracy": 0.1 * r + 0.3 * a, "n": 100}
        for a in (1, 2)
        for r in range(3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.path / "history.jsonl").write_text(text)
    page = read(run.path)
    assert "after round 2 of attempt 2" in page.words
    assert page.html.count("attempt 1<") == 1


def test_batches_are_shown_as_they_are_matched(synthetic_run: MakeRun) -> None:
    run = synthetic_run(clients=1, rounds=1, batch=4, defense="")
    run.add_results("gradient_similarity", lambda i, t: t.truth.inputs.flip(0))
    page = read(run.path)
    sources = page.values("img", "src")
    assert len(sources) == 8
    assert sources[0::2] == sources[1::2]
    assert "The attacked batches hold 4 images each." in page.words


def test_no_results_yet(synthetic_run: MakeRun) -> None:
    page = read(synthetic_run().path)
    assert "No adversary has attacked this recording yet" in page.words
    assert "Test accuracy of the global model by round: 30.0 % [" in page.words
    assert "img" not in page.tags


def test_without_truth_it_says_why_nothing_is_scored(synthetic_run: MakeRun) -> None:
    run = synthetic_run(audit=False)
    run.add_results("gradient_similarity", near)
    page = read(run.path)
    assert "it was no audit" in page.words
    assert "Defense unknown" in page.words
    assert "0 of 8" in page.words
    assert "nan" not in page.words.lower().split()
    assert len(page.values("img", "src")) == 8


def test_failures_only(synthetic_run: MakeRun) -> None:
    run = synthetic_run(lost="MemoryError")
    run.add_results("analytic", lambda i, t: "the first layer has no bias; try another attack")
    page = read(run.path)
    assert "every target failed, for the reasons below" in page.words
    assert "the first layer has no bias; try another attack" in page.words
    assert "error: MemoryError" in page.words
    assert "8 updates, 2 lost" in page.words


def test_interrupted_analyses_are_named(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    folder = run.add_results("gradient_similarity", near)
    config = ResultConfig.model_validate_json((folder / "config.json").read_text())
    open_end = config.model_copy(update={"complete": False})
    (folder / "config.json").write_text(open_end.model_dump_json())
    page = read(run.path)
    assert "The analysis by gradient_similarity was interrupted after 8 targets" in page.words


def test_no_baseline_is_said(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", near)
    assert "No baseline was scored on them" in read(run.path).words


def test_inputs_that_are_neither_images_nor_signals_are_named(synthetic_run: MakeRun) -> None:
    data = Samples(torch.rand(8, 2, 5, 6), torch.zeros(8, dtype=torch.int64))
    task = Task(input_shape=(2, 5, 6), classes=2, mean=(0.5, 0.5), std=(0.5, 0.5))
    run = synthetic_run(data=data, task=task)
    run.add_results("gradient_similarity", near)
    page = read(run.path)
    assert "inputs of 2 x 5 x 6 are neither images nor signals" in page.words
    assert "img" not in page.tags


def test_the_page_is_private_and_repeatable(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    run.add_results("gradient_similarity", near)
    path = write_report(run.path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0

    def undated(text: str) -> str:
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", text)

    assert undated(path.read_text()) == undated(write_report(run.path).read_text())


def test_commands_repeat_the_analysis(synthetic_run: MakeRun) -> None:
    run = synthetic_run(clients=2, rounds=3)
    run.targets = [target for target in run.targets if target.round == 2]
    run.add_results("gradient_similarity", near, adversary="gradient_similarity(tv=0.05)")
    run.add_results("analytic", near, oracle=("labels",))
    page = read(run.path)
    block = unescape(re.findall(r"<pre>(.*?)</pre>", page.html, re.DOTALL)[0])
    first, second, third, last = [shlex.split(line) for line in block.strip().splitlines()]
    assert first[-2:] == [">", "threat-model-1.toml"]
    assert 'labels = "oracle"' in first
    assert second[3:5] == ["--adversary", "analytic"]
    assert third[3:5] == ["--adversary", "gradient_similarity(tv=0.05)"]
    assert third[third.index("--rounds") + 1] == "2"
    assert "--targets" not in third
    assert last == ["fl-privacy", "report", str(run.path)]


def test_commands_give_a_task_and_a_training_that_were_given(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    folder = run.add_results("gradient_similarity", near)
    config = json.loads((folder / "config.json").read_text())
    config["task"]["mean"] = [0.25]
    config["threat_model"]["training"] = LocalTraining(lr=0.5).model_dump()
    (folder / "config.json").write_text(json.dumps(config))
    page = read(run.path)
    block = unescape(re.findall(r"<pre>(.*?)</pre>", page.html, re.DOTALL)[0])
    model, task, attack, _ = [shlex.split(line) for line in block.strip().splitlines()]
    given = tomllib.loads("\n".join(task[2:-2]))
    assert Task.model_validate(given).mean == (0.25,)
    granted = ThreatModel.model_validate(tomllib.loads("\n".join(model[2:-2])))
    assert granted.training == LocalTraining(lr=0.5)
    assert attack[attack.index("--task") + 1] == task[-1]
    assert "learning rate 0.5" in page.words


def test_history_of_a_killed_run_loses_its_torn_line_only(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    path = run.path / "history.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"round": 9, "accu')
    assert "after round 2" in read(run.path).words
    path.write_text('{"round": 0}\n' + whole)
    with pytest.raises(ReportError, match=r"history\.jsonl: expected lines such as"):
        write_report(run.path)
    path.write_text(json.dumps({"round": 0, "accuracy": 1.5, "n": 3}) + "\n")
    with pytest.raises(ReportError, match=r"history\.jsonl"):
        write_report(run.path)

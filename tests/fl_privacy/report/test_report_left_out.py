"""What the report says beside scores: leaked labels, what was not run, what an audit tells."""

import re
from collections.abc import Callable
from html import unescape
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_privacy.left_out import read_left_out, write_left_out
from fl_privacy.report import words, write_report
from fl_privacy.results import ResultError

MakeRun = Callable[..., Any]
NOISE = "gaussian_noise(scale=0.1)"


def exact(i: int, target: Any) -> Tensor:
    inputs: Tensor = target.truth.inputs
    return inputs


def gray(i: int, target: Any) -> Tensor:
    return torch.full_like(target.truth.inputs, 0.4)


def page_of(run: Any) -> str:
    text = write_report(run.path).read_text(encoding="utf-8")
    return " ".join(re.sub("<[^>]*>", " ", unescape(text)).split())


def test_what_was_left_out_is_listed_with_its_reason_adversary_by_adversary(
    synthetic_run: MakeRun,
) -> None:
    run = synthetic_run()
    run.add_results("dlg", gray)
    assert read_left_out(run.path) == {}
    write_left_out(run.path, "dlg", [("likelihood", "outdated")])
    write_left_out(run.path, "dlg", [("defense inside", "nothing but noise & more")])
    write_left_out(run.path, "idlg", [("early rounds", "its targets are among those of plain")])
    page = page_of(run)
    assert "dlg, defense inside not run by itself nothing but noise & more" in page
    assert "idlg, early rounds not run by itself its targets are among" in page
    assert "outdated" not in page
    (run.path / "results" / "left-out.json").write_text("[]")
    with pytest.raises(ResultError, match=r"left-out\.json: damaged"):
        page_of(run)


@pytest.mark.parametrize(("pictures", "shown"), [(gray, True), (exact, False)])
def test_labels_are_on_the_card_where_they_alone_leaked(
    synthetic_run: MakeRun, monkeypatch: pytest.MonkeyPatch, pictures: Any, shown: bool
) -> None:
    monkeypatch.setattr(words, "labels_too", lambda best: " The labels leaked." if best else "")
    run = synthetic_run(clients=8, rounds=1)
    run.add_results("gradient_similarity", pictures)
    run.add_results("baseline", gray)
    page = page_of(run)
    card = page[: page.index("From the updates of")]
    assert bool(re.search(r"100 % labels \(guess \d+ %\)", card)) == shown


def test_the_clients_own_settings_are_told_as_far_as_the_audit_wrote_them(
    synthetic_run: MakeRun,
) -> None:
    said = "client-defense, from the audit"
    audited = synthetic_run()
    audited.add_results("dlg", gray)
    assert f"{said} none; {NOISE}" in page_of(audited)


def test_settings_that_say_nothing_are_left_out_of_the_budget(synthetic_run: MakeRun) -> None:
    run = synthetic_run()
    settings = {"unread": "", "width": None, "defended": False, "restarts": 2}
    run.add_results("dlg", gray, settings=settings)
    assert "Budget: defended no, restarts 2; " in page_of(run)

import pytest

from fl_privacy import round_progress
from fl_privacy.round_progress import INITIAL


def test_the_bar_says_what_flower_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def update(self: object, task: object, *, description: str, **_: object) -> None:
        said.append(description)

    monkeypatch.setattr("rich.progress.Progress.update", update)
    with round_progress.round_progress(verbose=False) as stream:
        for line in ("INFO : Loaded", f"INFO : {INITIAL}: 9 test images", "INFO : [ROUND 1/2]"):
            stream(line)
    assert said == ["evaluating the initial model", "training"]

"""A report does not call a run untrained that began with trained parameters."""

from __future__ import annotations

from fl_privacy.report.words import rounds

ROWS = [{"attempt": 1, "round": 1, "rounds": "1"}]


def test_round_one_is_untrained_unless_the_run_was_given_parameters() -> None:
    assert "(untrained)" in rounds(ROWS)
    assert "(trained)" in rounds(ROWS, given=True)

"""The membership audit on real client steps: never above the guarantee, and not blind."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from clients.accounting import epsilon_of
from clients.defenses.gaussian_noise import GaussianNoise
from clients.membership import discriminant
from fl_privacy import membership_command as command
from fl_privacy.cli import main
from fl_privacy.membership_result import (
    FOLDER,
    MembershipError,
    read_result,
    results_of,
    write_result,
)
from fl_privacy.privacy_spent import FILE as SPENT
from fl_privacy.privacy_spent import NoisySteps, PrivacySpent
from fl_privacy.recording import Manifest, RecordingWriter
from fl_privacy.report.privacy import privacy_section
from fl_privacy.settings import RunSettings
from fl_privacy.truth import TruthVault

SETTINGS = RunSettings(dataset="digits", model="mlp(hidden=(8,))", batch_size=4)
NOISY = "dp_sgd(noise_multiplier=0.5)"


def test_with_noise_the_bound_is_something_and_below_the_guarantee() -> None:
    result = command.audit(SETTINGS, NOISY, trials=300)
    steps = NoisySteps(noise_multiplier=0.5, sample_rate=1.0, count=1)
    assert result.epsilon == epsilon_of([steps], 1e-5)
    assert 0.5 < result.bound <= result.epsilon
    assert result.neighbors == "removed"
    assert result.true_positives[1] == result.false_positives[1] == 150
    command.require_kept(result)


def test_dropout_is_drawn_from_the_seed_and_leaves_the_global_state_alone() -> None:
    settings = RunSettings(dataset="fashion-mini", model="das-fashionnet", batch_size=2)
    before = torch.random.get_rng_state()
    first, again = (command.audit(settings, NOISY, trials=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (first.threshold, first.bound) == (again.threshold, again.bound)


def test_sampling_and_rounds_are_accounted_and_the_bound_stays_below() -> None:
    result = command.audit(SETTINGS, NOISY, trials=60, samples=8, rounds=3)
    steps = NoisySteps(noise_multiplier=0.5, sample_rate=0.5, count=3)
    assert result.epsilon == epsilon_of([steps], 1e-5)
    assert result.bound <= result.epsilon


@pytest.mark.parametrize(
    ("defense", "neighbors"),
    [
        ("", "replaced"),
        ("per_sample_clipping(max_norm=1.0)", "replaced"),
        ("dp_sgd(noise_multiplier=0.0)", "removed"),
    ],
)
def test_without_noise_the_same_audit_reaches_at_least_one(defense: str, neighbors: str) -> None:
    result = command.audit(SETTINGS, defense, trials=100)
    assert result.bound >= 1
    assert result.epsilon is None
    assert result.neighbors == neighbors


def test_a_canary_among_others_shows_without_noise_although_batches_are_random() -> None:
    """It is in half of the batches, which are told apart from all others.

    75 hits and no alarm in 150 trials each are a bound of 2.
    """
    result = command.audit(SETTINGS, "dp_sgd(noise_multiplier=0.0)", trials=300, samples=8)
    assert result.bound >= 1


def test_the_audit_is_the_same_for_the_same_seed() -> None:
    first, again = (command.audit(SETTINGS, NOISY, trials=10) for _ in range(2))
    assert first.threshold == again.threshold
    other = command.audit(SETTINGS.model_copy(update={"seed": 1}), NOISY, trials=10)
    assert other.threshold != first.threshold


def test_noise_that_is_weaker_than_its_account_is_found_and_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def weak(scale: float) -> GaussianNoise:
        return GaussianNoise(scale=scale / 20)

    monkeypatch.setattr("clients.defenses.dp_sgd.GaussianNoise", weak)
    result = command.audit(SETTINGS, "dp_sgd(noise_multiplier=3.0)", trials=100)
    assert result.violated
    with pytest.raises(command.GuaranteeBroken, match=r"a bug or a broken assumption was found"):
        command.require_kept(result)


@pytest.mark.parametrize(
    ("settings", "defense", "options", "message"),
    [
        (SETTINGS, "", {"trials": 3}, "4 trials or more"),
        (SETTINGS, "", {"samples": 10**6}, "has 1437 training samples"),
        (SETTINGS, "", {"delta": 1.5}, "delta between 0 and 1"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    settings: RunSettings, defense: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(MembershipError, match=message):
        command.audit(settings, defense, **options)  # type: ignore[arg-type]


def test_the_discriminant_is_fishers() -> None:
    """The inverse of the whole covariance times the canary, which is too large in earnest."""
    draws = torch.Generator().manual_seed(0)
    canary = torch.randn(12, generator=draws, dtype=torch.float64)
    others = torch.randn(5, 12, generator=draws, dtype=torch.float64)
    covariance = 0.3 * 0.7 * others.T @ others + 0.5**2 * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(covariance, canary)
    found = discriminant(canary, others, rate=0.3, noise=0.5)
    torch.testing.assert_close(found, expected / expected.norm())
    calm = discriminant(canary, others, rate=0.3, noise=0.0)
    assert float((others @ calm).abs().max()) < 1e-6
    whole = discriminant(canary, others, rate=1.0, noise=0.5)
    torch.testing.assert_close(whole, canary / canary.norm())


def test_the_command_prints_both_epsilons_and_the_report_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / FOLDER / "one.json"
    argv = ["fl-privacy", "membership", "--defense", NOISY, "--dataset", "digits", "--model"]
    argv += ["mlp(hidden=(8,))", "--batch-size", "2", "--trials", "20", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    result = read_result(out)
    for said in (f"{result.epsilon:.3f}", f"{result.bound:.3f}", "99.9 %", "seed"):
        assert said in shown
    steps = (NoisySteps(noise_multiplier=0.75, sample_rate=0.5, count=3),)
    account = PrivacySpent(participations=3, steps=steps, epsilon=1.25, delta=1e-5)
    (tmp_path / "clients" / "4").mkdir(parents=True)
    (tmp_path / "clients" / "4" / SPENT).write_text(account.model_dump_json())
    page = privacy_section(tmp_path)
    for said in ("shows no epsilon above 0", f"at most {result.epsilon:.3f}", ">1.250<", ">0.75<"):
        assert said in page
    assert "lower bound is above" not in page
    write_result(out, result.model_copy(update={"bound": 99.0, "defense": "<b>"}))
    assert "lower bound is above" in privacy_section(tmp_path)
    assert "Defense &lt;b&gt;" in privacy_section(tmp_path)


def test_a_run_without_privacy_has_no_section_and_damage_is_named(tmp_path: Path) -> None:
    assert privacy_section(tmp_path) == ""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "one.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(MembershipError, match=r"one\.json: no membership result"):
        privacy_section(tmp_path)


def recorded(run: Path, *defenses: str, rounds: int = 2) -> Path:
    """A run of clients with these ``defenses`` and 6, 7, ... samples."""
    settings = SETTINGS.model_copy(update={"num_server_rounds": rounds})
    manifest = Manifest(
        created="",
        model=SETTINGS.model,
        dataset=SETTINGS.dataset,
        local_training=SETTINGS.local_training,
        run_config=settings.public(),
    )
    with RecordingWriter.open(run / "recording", manifest):
        pass
    for i, spec in enumerate(defenses):
        for number in range(1, rounds + 1):
            TruthVault(run / "truth").write_defense(
                attempt=1, round=number, node=str(i), spec=spec, stats={"samples": 6 + i}
            )
    return run


def test_the_client_is_the_runs_own_where_nothing_else_is_said(tmp_path: Path) -> None:
    run = recorded(tmp_path, "", NOISY, NOISY)
    assert command.client_of(run, None, None, None) == command.Client(NOISY, 7, 2)
    assert command.client_of(run, "", None, 5) == command.Client("", 6, 5)
    assert command.client_of(run, "top_k(k=3)", 4, None) == command.Client("top_k(k=3)", 4, 2)
    assert command.client_of(None, None, None, None) == command.Client("", None, 1)


@pytest.mark.parametrize(
    ("defenses", "message"),
    [((), "name it, such as --defense"), ((NOISY, "top_k(k=3)"), "differ in defense: name one")],
)
def test_a_defense_that_the_run_does_not_tell_is_asked_for(
    tmp_path: Path, defenses: tuple[str, ...], message: str
) -> None:
    run = recorded(tmp_path, *defenses)
    with pytest.raises(MembershipError, match=message):
        command.client_of(run, None, None, None)


def test_each_configuration_has_its_file_and_another_client_is_no_result_of_the_run(
    tmp_path: Path,
) -> None:
    run = recorded(tmp_path, NOISY)
    for defense, samples, rounds in ((NOISY, 6, 2), (NOISY, 6, 1), ("", 4, 2), (NOISY, 6, 2)):
        result = command.audit(SETTINGS, defense, samples=samples, rounds=rounds, trials=4)
        write_result(run / FOLDER / result.file_name, result)
    assert len(results_of(run)) == 3
    page = " ".join(privacy_section(run).split())
    own, *others = page.split("Not about this run’s clients:")
    assert f"Defense {NOISY}" in own
    assert "So few trials cannot show anything above 0" in own
    assert len(others) == 2
    for said in ("1 round (the run&#39;s: 2)", f"defense none (the run&#39;s: {NOISY})"):
        assert sum(said in other for other in others) == 1


@pytest.mark.parametrize("trials", [4, 16, 20, 200])
def test_the_largest_bound_is_that_of_a_test_that_is_never_wrong(trials: int) -> None:
    """With n trials a world, P(no error) >= 0.0005 leaves rates of 0.0005^(1/n) and its rest."""
    result = command.audit(SETTINGS, "", trials=trials)
    hit = 0.0005 ** (2 / trials)
    assert result.largest_bound == pytest.approx(max(0, math.log((hit - 1e-5) / (1 - hit))))
    assert result.bound <= result.largest_bound
    assert ("too few" in command.possible(result)) == (result.largest_bound == 0)

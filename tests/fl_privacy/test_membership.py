"""The membership audit on real client steps: never above the guarantee, and not blind."""

import json
import sys
from pathlib import Path

import pytest
import torch

from clients.accounting import epsilon_of
from clients.defenses.gaussian_noise import GaussianNoise
from clients.membership import discriminant
from fl_privacy import membership_command as command
from fl_privacy.cli import main
from fl_privacy.membership_result import FILE, MembershipError, read_result, write_result
from fl_privacy.privacy_spent import FILE as SPENT
from fl_privacy.privacy_spent import NoisySteps, PrivacySpent
from fl_privacy.report.privacy import privacy_section
from fl_privacy.settings import RunSettings

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
    out = tmp_path / FILE
    argv = ["fl-privacy", "membership", "--defense", NOISY, "--dataset", "digits", "--model"]
    argv += ["mlp(hidden=(8,))", "--batch-size", "2", "--trials", "20", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    result = read_result(out)
    assert result is not None
    for said in (f"{result.epsilon:.3f}", f"{result.bound:.3f}", "99.9 %", "seed"):
        assert said in shown
    account = PrivacySpent(participations=3, epsilon=1.25, delta=1e-5)
    (tmp_path / "clients" / "4").mkdir(parents=True)
    (tmp_path / "clients" / "4" / SPENT).write_text(account.model_dump_json())
    page = privacy_section(tmp_path)
    for said in (f"at least {result.bound:.3f}", f"at most {result.epsilon:.3f}", ">1.250<"):
        assert said in page
    assert "lower bound is above" not in page
    write_result(out, result.model_copy(update={"bound": 99.0, "defense": "<b>"}))
    assert "lower bound is above" in privacy_section(tmp_path)
    assert "Defense &lt;b&gt;" in privacy_section(tmp_path)


def test_a_run_without_privacy_has_no_section_and_damage_is_named(tmp_path: Path) -> None:
    assert privacy_section(tmp_path) == ""
    (tmp_path / FILE).write_text(json.dumps({"format_version": 1}))
    with pytest.raises(MembershipError, match=r"membership\.json: no membership result"):
        privacy_section(tmp_path)

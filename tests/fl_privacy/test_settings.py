import tomllib
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from fl_privacy.component import VERSION, ComponentError
from fl_privacy.settings import RunSettings, parse_settings

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def pyproject() -> dict[str, Any]:
    return tomllib.loads(PYPROJECT.read_text())


def test_run_config_of_the_bundle_declares_every_setting_with_its_default() -> None:
    assert pyproject()["tool"]["flwr"]["app"]["config"] == RunSettings().model_dump(by_alias=True)


def test_versions_agree() -> None:
    assert pyproject()["project"]["version"] == VERSION


def test_clients_own_settings_and_the_path_stay_out_of_a_recording() -> None:
    settings = parse_settings({"client-defense": "gaussian_noise(scale=1)", "out-dir": "/x"})
    public = settings.public()
    assert not [key for key in public if key.startswith("client-")]
    assert "out-dir" not in public
    assert public["lr"] == settings.lr


def test_a_new_setting_is_not_recorded_unless_it_says_so() -> None:
    class Grown(RunSettings):
        client_secret: str = "x"
        token: Annotated[str, Field(description="of a new service")] = "x"

    assert Grown().public() == RunSettings().public()
    out = set(RunSettings().model_dump(by_alias=True)) - set(RunSettings().public())
    own = {"client-defense", "client-defended-share", "client-state-dir", "client-report-epsilon"}
    deployed = {"client-dataset", "client-audit-dir", "wait-seconds", "round-seconds"}
    inference = {"client-property", "client-property-schedule", "client-victims"}
    inference |= {"client-active-clients", "client-active-alpha"}
    assert out == {*own, *inference, *deployed, "client-encoding", "out-dir"}


@pytest.mark.parametrize(
    ("share", "clients", "defended"),
    [(0.07, 100, 7), (0.29, 100, 29), (0.5, 4, 2), (0.3, 4, 1), (1.0, 7, 7), (0.0, 7, 0)],
)
def test_a_share_of_the_clients_is_a_rounded_number(
    share: float, clients: int, defended: int
) -> None:
    assert RunSettings(client_defended_share=share).defended(clients) == defended


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nope": 1}, r"nope.*num-server-rounds"),
        ({"lr": -1}, r"lr: .*greater than 0 \(got -1\)"),
        ({"lr": float("nan")}, r"lr: .*finite"),
        ({"record-rounds": "a-b"}, "record-rounds"),
        ({"algorithm": "sgd"}, r"'fedsgd' or 'fedavg'"),
        ({"num-server-rounds": 0}, "num-server-rounds"),
    ],
)
def test_wrong_settings_are_named_with_what_exists(config: dict[str, object], message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        parse_settings(config)

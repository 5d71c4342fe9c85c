import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fl_privacy.cli import app, main
from fl_privacy.component import VERSION
from fl_privacy.recording import Manifest, RecordingWriter
from fl_privacy.settings import RunSettings
from fl_privacy.superlink import SimulationError

# Option of `simulate` -> setting that it overrides, where the names differ.
FIELD_OF = {
    "rounds": "num_server_rounds",
    "epochs": "local_epochs",
    "defense": "client_defense",
    "defended_share": "client_defended_share",
}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "type[Command]":
    class Bound(Command):
        def __init__(self, *arguments: str) -> None:
            monkeypatch.setattr(sys, "argv", ["fl-privacy", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
            self.code = ended.value.code or 0
            self.out, self.err = capsys.readouterr()

    return Bound


class Command:
    code: int | str
    out: str
    err: str

    def __init__(self, *arguments: str) -> None: ...


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import fl_privacy.cli, sys; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "flwr", "ray", "numpy", "matplotlib"}.isdisjoint(ended.stdout.split())


def test_version(cli: type[Command]) -> None:
    assert cli("--version").out.strip() == f"fl-privacy {VERSION}"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_soon_sleep_unless_told_otherwise(
    given: dict[str, str],
    spins: str | None,
    cli: type[Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli("--version")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def commands() -> list[str]:
    return sorted(typer.main.get_group(app).commands)


@pytest.mark.parametrize("name", commands())
def test_every_help_has_examples(name: str, cli: type[Command]) -> None:
    shown = cli(name, "--help")
    assert shown.code == 0
    assert f"fl-privacy {name} " in shown.out.partition("Example")[2]


def test_the_defaults_that_simulate_shows_are_the_settings_defaults() -> None:
    command = typer.main.get_group(app).commands["simulate"]
    shown = {option.name or "": getattr(option, "show_default", None) for option in command.params}
    texts = {name: text for name, text in shown.items() if isinstance(text, str)}
    stated = {"no-audit": "False", "none": ""}
    for name, text in texts.items():
        field = RunSettings.model_fields[FIELD_OF.get(name, name)]
        assert stated.get(text, text) == str(field.default), name
    assert {"rounds", "dataset", "lr", "audit", "seed"} <= texts.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "nope=1"), "nope"),
        (("--set", "lr"), "KEY=VALUE"),
        (("--lr", "-1"), "greater than 0"),
        (("--dataset", "nope"), "no dataset 'nope'; installed: adult"),
        (("--model", "nope"), "no model 'nope'; installed"),
        (("--model", "lenet_zhu"), "no model 'lenet_zhu', did you mean 'lenet-zhu'?; installed"),
        (("--defense", "soteria(rte=1)"), "did you mean 'rate'? Settings of soteria: layer, rate"),
        (
            ("--defense", "gaussian_noise(scale=1)+soteria"),
            "after it; got gaussian_noise + soteria",
        ),
        (("--partition", "iid(x=1)"), "iid"),
        (("--defense", "gaussian_noise(scale=-1)"), "scale"),
        (("--strategy", "nope"), "no strategy 'nope'; installed: bulyan"),
        (("--strategy", "krum(x=1)"), "Settings of krum: num_malicious_nodes"),
        (("--resume",), "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, cli: type[Command], tmp_path: Path
) -> None:
    ended = cli("simulate", "--out", str(tmp_path / "run"), *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_an_existing_recording_is_refused(cli: type[Command], tmp_path: Path) -> None:
    before = sorted(recorded(tmp_path).rglob("*"))
    ended = cli("simulate", "--out", str(tmp_path))
    assert ended.code == 2
    assert "holds a recording already" in ended.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stale_ray_address_is_named(
    cli: type[Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = cli("simulate", "--out", str(tmp_path / "run"))
    assert ended.code == 1
    assert "RAY_ADDRESS=127.0.0.1:1" in ended.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_privacy.cli.app", lambda: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        main()


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fl_privacy.cli.app", lambda: Path("/dev/null/x").read_bytes())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: /dev/null/x: Not a directory")
    assert error.count("\n") == 1
    monkeypatch.setenv("FL_PRIVACY_DEBUG", "1")
    with pytest.raises(NotADirectoryError):
        main()


def recorded(folder: Path) -> Path:
    import numpy as np

    manifest = Manifest(created="2026-01-01T00:00:00+00:00", model="mlp", dataset="digits")
    with RecordingWriter.open(folder / "recording", manifest) as writer:
        arrays = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
        _, sent = writer.put_global(arrays)
        for round in (1, 2, 4):
            writer.append(round=round, node="7", arrays=arrays, num_examples=1, global_digest=sent)
        writer.append(
            round=4,
            node="8",
            arrays=None,
            num_examples=None,
            global_digest=sent,
            status="error: out of memory",
        )
    return folder


def test_inspect_shows_rounds_clients_and_errors(cli: type[Command], tmp_path: Path) -> None:
    shown = cli("inspect", str(recorded(tmp_path)), "--verify")
    assert shown.code == 0
    assert "1-2,4" in shown.out
    assert "out of memory" in shown.out
    assert "mlp" in shown.out
    assert "intact" in shown.out


HOSTILE = "\x1b]0;pwned\x07\x1b[2J[/red]"


def test_inspect_shows_hostile_text_without_obeying_it(cli: type[Command], tmp_path: Path) -> None:
    manifest = Manifest(created="now", model=f"mlp{HOSTILE}", dataset="npz(/data/[faces]/x.npz)")
    with RecordingWriter.open(tmp_path / "recording", manifest) as writer:
        writer.append(
            round=1,
            node="7",
            arrays=None,
            num_examples=None,
            global_digest="",
            status=f"error: {HOSTILE}",
        )
    shown = cli("inspect", str(tmp_path))
    assert shown.code == 0
    assert "\x1b" not in shown.out and "\x07" not in shown.out
    assert "/data/[faces]/x.npz" in shown.out
    assert "[/red]" in shown.out


def test_an_error_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise SimulationError(HOSTILE)

    monkeypatch.setattr("fl_privacy.cli.app", fail)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "Error: ]0;pwned[2J[/red]\n"


def test_colons_in_an_error_are_no_emoji(cli: type[Command], tmp_path: Path) -> None:
    ended = cli("attack", str(recorded(tmp_path)), "--model", "app:x")
    assert ended.code == 2
    assert "app:x: cannot import" in ended.err


def test_inspect_tells_of_updates_that_are_not_listed(cli: type[Command], tmp_path: Path) -> None:
    index = recorded(tmp_path) / "recording/index/000000.jsonl"
    index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:2]))
    shown = cli("inspect", str(tmp_path), "--verify")
    assert shown.code == 0
    assert "updates/1/4/2.safetensors" in shown.err


def test_inspect_names_a_damaged_file_and_fails(cli: type[Command], tmp_path: Path) -> None:
    victim = sorted(recorded(tmp_path).glob("recording/updates/*/*/*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    shown = cli("inspect", str(tmp_path), "--verify")
    assert shown.code == 1
    assert str(victim) in shown.err


def test_inspect_refuses_what_is_no_run(cli: type[Command], tmp_path: Path) -> None:
    shown = cli("inspect", str(tmp_path))
    assert shown.code == 2
    assert "is not a recording" in shown.err


def test_list_shows_settings_and_defaults(cli: type[Command]) -> None:
    shown = cli("list", "settings").out
    assert all(key in shown for key in RunSettings().model_dump(by_alias=True))
    assert "num_malicious_nodes=0" in cli("list", "strategies").out
    assert "gaussian_noise" in cli("list", "defenses").out
    unknown = cli("list", "nope")
    assert unknown.code == 2
    assert "strategies" in unknown.err


def test_a_narrow_list_folds_names_and_cuts_nothing(
    cli: type[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ("dp-strategies", "adversaries", "settings"):
        shown = cli("list", group).out
        assert "…" not in shown
    folded = "".join(
        line[2:].split("│")[0].strip() for line in cli("list", "dp-strategies").out.splitlines()
    )
    assert "server-side-adaptive-clipping" in folded.replace(" ", "")


def test_inspect_tells_of_sparse_replies_and_central_privacy(
    cli: type[Command], tmp_path: Path
) -> None:
    import numpy as np

    central = "server-side-fixed-clipping(noise_multiplier=1.0)"
    manifest = Manifest(created="", run_config={"dp-strategy": central})
    with RecordingWriter.open(tmp_path / "recording", manifest) as writer:
        _, sent = writer.put_global({"weight": np.zeros(3, dtype=np.float32)})
        writer.append(
            round=1,
            node="7",
            arrays={"weight": np.ones(3, dtype=np.float32)},
            num_examples=1,
            global_digest=sent,
        )
    shown = cli("inspect", str(tmp_path)).out
    assert central in " ".join(shown.split())
    assert "sparse" not in shown


def test_list_says_what_is_missing_or_broken_and_goes_on(
    cli: type[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = {"broken": "no_such_package:X", "iid": "fl_privacy.datasets.partitions:IID"}
    monkeypatch.setattr("fl_privacy.inspection.installed", lambda group: offered)
    monkeypatch.setattr("fl_privacy.component.installed", lambda group: offered)
    shown = cli("list", "partitions")
    assert shown.code == 0
    assert "no_such_package" in shown.out
    assert "Shuffle, then deal" in shown.out
    monkeypatch.setattr("fl_privacy.inspection.installed", lambda group: {})
    assert "none installed" in cli("list", "layer_metrics").out


def test_list_shows_names_without_backticks(
    cli: type[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks the line within the formula
    shown = cli("list").out
    assert "N(0, scale^2)" in shown
    assert "`" not in shown


def test_list_imports_none_of_the_libraries_behind_the_components() -> None:
    code = (
        "import sys; "
        "from fl_privacy.inspection import groups, listing; [listing(g) for g in groups()]; "
        "print(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torchvision", "torchmetrics", "sklearn", "flwr_datasets", "matplotlib", "ray"}
    assert heavy.isdisjoint(ended.stdout.split())

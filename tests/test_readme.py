"""The README's commands, run as a newcomer would, in one shell and in their order."""

import os
import re
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_privacy.processes import end, marked
from fl_privacy.results import load_results

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("make test",)
"""It is what runs this test."""


def commands(page: Path) -> str:
    """The shell blocks of a page, one after the other."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(block for block in blocks if block.strip() not in LEFT_OUT)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project as it is, with the environment that runs this test."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    copy = tmp_path / "fl-privacy"
    for name in names:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    os.utime(copy / "pyproject.toml", (0, 0))  # or make would install the copy into our .venv
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A private home and ports for Flower; what is left running is ended afterwards."""
    mark = f"FL_PRIVACY_README={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    yield {
        **{k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))},
        name: value,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    end(mark)
    assert not marked(mark)


@pytest.mark.flower
@pytest.mark.timeout(480)
@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="no .venv made by make")
def test_the_commands_of_the_readme_work(checkout: Path, environment: dict[str, str]) -> None:
    script = commands(checkout / "README.md")
    assert "make demo" in script
    assert "flwr run . local --stream" in script
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = checkout / "runs"
    for run in ("demo", "first"):
        assert (runs / run / "report.html").stat().st_size > 50_000
        assert f"{run}/report.html" in done.stdout
    demo = {result.config.adversary: result.rows() for result in load_results(runs / "demo")}
    assert len(demo) == 3
    gain = mean_psnr(demo["gradient_similarity"], "") - mean_psnr(demo["baseline"], "")
    assert gain > 8
    noise = "gaussian_noise(scale=0.005)"
    strongest = max(mean_psnr(rows, noise) for name, rows in demo.items() if name != "baseline")
    assert abs(strongest - mean_psnr(demo["baseline"], noise)) < 2
    assert (runs / "defended" / "history.jsonl").exists()


def mean_psnr(rows: list[dict[str, Any]], defense: str) -> float:
    values = [row["psnr"] for row in rows if row["defense"] == defense]
    assert len(values) == 32
    return float(sum(values) / len(values))


def test_the_guide_s_example_plug_in_conforms() -> None:
    code = "".join(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL)
    )
    assert "check_adversary(Grey())" in code
    exec(compile(code, "docs/plugins.md", "exec"), {"__name__": "guide"})

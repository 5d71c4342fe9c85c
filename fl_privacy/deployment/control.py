"""Ask the SuperLink of a deployment, by ``flwr`` on its control port."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from typing import Any

from fl_privacy.deployment.roles import LOOPBACK
from fl_privacy.deployment.topology import Deployment, DeploymentFailure
from fl_privacy.printable import plain
from fl_privacy.run_folder import private_folder
from fl_privacy.superlink import SuperLink, flower_environment
from fl_privacy.tls import CA

CONNECTION = "deployed"
START_SECONDS = 90.0


def control(deployment: Deployment) -> SuperLink:
    """The environment in which ``flwr`` reaches the SuperLink of a deployment.

    Raises:
        DeploymentFailure: there is none, as the deployment was never up.
    """
    if not deployment.state.is_dir():
        raise DeploymentFailure("the deployment was never up: fl-privacy deploy up")
    home = deployment.state / "flwr" / "control"
    private_folder(home / "work")
    (home / "config.toml").write_text(
        f"[superlink]\ndefault = {json.dumps(CONNECTION)}\n[superlink.{CONNECTION}]\n"
        f"address = {json.dumps(f'{LOOPBACK}:{deployment.ports.control}')}\n"
        f"root-certificates = {json.dumps(str(deployment.certificates / CA) + '.crt')}\n"
    )
    return SuperLink(home, flower_environment(home))


def ask(deployment: Deployment, *command: str) -> dict[str, Any]:
    """What a ``flwr`` command answers in JSON.

    Raises:
        DeploymentFailure: the SuperLink does not answer, or refuses.
    """
    link = control(deployment)
    done = subprocess.run(
        ["flwr", *command, CONNECTION, "--format", "json"],
        env=link.environment,
        cwd=link.work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    answer: dict[str, Any] = {}
    with suppress(ValueError):
        answer = json.loads(done.stdout)
    if not answer.get("success"):
        said = answer.get("error-message") or done.stderr or done.stdout
        raise DeploymentFailure(f"flwr {' '.join(command)}: {plain(str(said)).strip()}")
    return answer

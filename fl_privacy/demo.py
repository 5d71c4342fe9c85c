"""The demo: a real federation, half of it defended, attacked and shown on one page.

Every update is the gradient of one image on a hardly trained LeNet, the easiest case there
is for the server; the page says so. The defended half adds Gaussian noise of standard
deviation 0.5 to each gradient entry (0.005 in weight units at lr 0.01), more than most
federations could train with.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fl_privacy import attack_command, simulation
from fl_privacy.plan import Plan
from fl_privacy.report import write_report
from fl_privacy.results import ResultSet
from fl_privacy.round_progress import round_progress
from fl_privacy.settings import Scalar

CLIENTS = 16
SETTINGS: dict[str, Scalar] = {
    "num-server-rounds": 4,
    "lr": 0.01,
    "batch-size": 1,
    "audit": True,
    "client-defense": "gaussian_noise(scale=0.005)",
    "client-defended-share": 0.5,
}
ADVERSARIES = ("gradient_similarity", "gradient_similarity(tv=0.05)")
"""As published, and with the image prior that an adversary takes who expects noise."""


def first_free(folder: Path) -> Path:
    """``folder``, or ``folder-2``, ``folder-3``, ... when it is taken."""
    count = 1
    free = folder
    while free.exists():
        count += 1
        free = folder.with_name(f"{folder.name}-{count}")
    return free


def run_demo(out: Path, *, echo: Callable[[str], None]) -> Path:
    """Run the demo into ``out``; returns the report. Prints the command behind each step."""
    echo(f"$ {simulate_command(out)}")
    with round_progress(verbose=False) as stream:
        simulation.simulate(SETTINGS, out=out, clients=CLIENTS, stream=stream)
    results: list[ResultSet] = []
    for adversary in ADVERSARIES:
        echo(f"$ fl-privacy attack {shlex.quote(str(out))} --adversary {shlex.quote(adversary)}")
        attacked, baseline = attack_command.attack(out, Plan(adversary=adversary))
        results += [attacked] if results else [baseline, attacked]
    Console(file=sys.stdout, emoji=False).print(attack_command.scores(results))
    echo(f"$ fl-privacy report {shlex.quote(str(out))}")
    return write_report(out)


def simulate_command(out: Path) -> str:
    """The same simulation as a command."""
    settings = " ".join(
        f"--set {shlex.quote(f'{key}={str(value).lower()}')}" for key, value in SETTINGS.items()
    )
    return f"fl-privacy simulate --out {shlex.quote(str(out))} --clients {CLIENTS} {settings}"

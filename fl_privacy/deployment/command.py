"""``fl-privacy deploy``: a real federation on this machine, from one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fl_privacy.printable import printable

if TYPE_CHECKING:
    from fl_privacy.deployment.local import Living
    from fl_privacy.deployment.topology import Deployment

app = typer.Typer(
    no_args_is_help=True,
    help="A real federation on this machine: SuperLink and SuperNodes over gRPC with TLS and keys.",
    epilog="""Examples:

fl-privacy deploy init

fl-privacy deploy up

fl-privacy deploy run first --audit

fl-privacy deploy status

fl-privacy deploy down""",
)

File = Annotated[
    Path, typer.Option("--file", "-f", metavar="FILE", help="Deployment file, in TOML.")
]
DEFAULT = Path("deployment.toml")


@app.command(
    epilog="""Examples:

fl-privacy deploy init

fl-privacy deploy init --nodes 5 --file hospitals.toml"""
)
def init(
    file: File = DEFAULT,
    nodes: Annotated[int, typer.Option(min=1, max=1000, help="Number of SuperNodes.")] = 2,
) -> None:
    """Write a deployment file to begin with."""
    from fl_privacy.deployment.topology import write_example

    write_example(file, nodes=nodes)
    typer.echo(f"Wrote {file}. Look at it, then: fl-privacy deploy up{_told(file)}")


@app.command(
    epilog="""Examples:

fl-privacy deploy up

fl-privacy deploy up --file hospitals.toml"""
)
def up(file: File = DEFAULT) -> None:
    """Start what does not run yet, register the nodes, and wait until all are online.

    Certificates and keys are made when there are none. Call it again after something ended.
    """
    from fl_privacy.deployment import local

    deployment = _read(file)
    console = Console(stderr=True, emoji=False)
    with console.status("preparing") as shown:
        local.up(deployment, lambda step: shown.update(f"{step} ..."))
    typer.echo(
        f"{len(deployment.nodes)} SuperNodes are online. "
        f"Next: fl-privacy deploy run first{_told(file)}"
    )


@app.command(
    epilog="""Examples:

fl-privacy deploy run first

fl-privacy deploy run longer --set num-server-rounds=20 --set lr=0.05 --audit

fl-privacy deploy run longer --resume --set num-server-rounds=20 --set lr=0.05 --audit"""
)
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the run, and of its folder.")],
    file: File = DEFAULT,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Setting of this run; repeat."),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Each node keeps its truth, in its own folder.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut off.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's log.")] = False,
) -> None:
    """Train on the nodes, the server recording every update, and follow to the end.

    On Ctrl-C the run goes on; --resume follows it again.
    """
    from fl_privacy.cli import run_config
    from fl_privacy.deployment import runs
    from fl_privacy.inspection import recorded
    from fl_privacy.round_progress import round_progress

    deployment = _read(file)
    changes = run_config({}, set_ or [])
    try:
        with round_progress(verbose) as stream:
            folder = runs.run(deployment, name, changes, audit=audit, resume=resume, stream=stream)
    except KeyboardInterrupt:
        if runs.going_on(deployment, name):
            typer.echo(
                f"{name} goes on. Follow it: the same command with --resume; "
                f"end it: fl-privacy deploy stop {name}{_told(file)}",
                err=True,
            )
        raise typer.Exit(130) from None
    typer.echo(recorded(folder))
    if audit:
        typer.echo(
            f"Each node's truth stays with it, in {deployment.path}/node-N/runs/{name}/truth; "
            f"whoever may audit copies it beside the recording."
        )


@app.command(
    epilog="""Examples:

fl-privacy deploy stop first"""
)
def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the run.")], file: File = DEFAULT
) -> None:
    """End a run; what it recorded stays, and --resume goes on with it."""
    from fl_privacy.deployment import runs

    going = runs.stop(_read(file), name)
    typer.echo(f"Stopped {name}." if going else f"{name} is not going on.")


@app.command(
    epilog="""Examples:

fl-privacy deploy status"""
)
def status(file: File = DEFAULT) -> None:
    """Show which processes live, how many nodes are online, and what became of the runs.

    The exit status is 1 unless all processes live and all nodes are online.
    """
    from fl_privacy.deployment import local, members, runs
    from fl_privacy.deployment.topology import DeploymentFailure

    deployment = _read(file)
    console = Console(emoji=False)
    found = local.living(deployment)
    console.print(_processes(deployment, found))
    try:
        online, known = members.online(deployment), runs.runs(deployment)
    except DeploymentFailure:
        console.print("The SuperLink does not answer.")
        raise typer.Exit(1) from None
    if known:
        console.print(_runs(known, runs.names(deployment)))
    console.print(f"{online} of {len(deployment.nodes)} SuperNodes are online.")
    wrong = list(local.outdated(deployment, found))
    if other := local.strangers(deployment, found):
        wrong.append(f"{other} processes are of nodes that are no longer in the file: deploy down")
    if not all(one.pids for one in found):
        wrong.append(
            f"What ended is started by: fl-privacy deploy up{_told(file)}. The SuperLink takes a "
            f"SuperNode that was killed for online for about a minute."
        )
    for line in wrong:
        typer.echo(line)
    if wrong or online < len(deployment.nodes):
        raise typer.Exit(1)


@app.command(
    epilog="""Examples:

fl-privacy deploy down"""
)
def down(file: File = DEFAULT) -> None:
    """End every process of the deployment; files stay, and so do registered keys."""
    from fl_privacy.deployment import local

    count = local.down(_read(file))
    typer.echo(f"Ended {count} processes." if count else "Nothing was running.")


def _read(file: Path) -> Deployment:
    from fl_privacy.deployment.topology import read_deployment

    return read_deployment(file)


def _told(file: Path) -> str:
    """The option that names the file, where it is not the one taken without."""
    return "" if file == DEFAULT else f" --file {file}"


def _processes(deployment: Deployment, found: list[Living]) -> Table:
    from fl_privacy.deployment import local

    table = Table("process", "state", "pid", "log")
    for one in found:
        state = "runs" if one.pids else "[bold red]ended[/]"
        pids = str(min(one.pids)) if one.pids else ""
        log = str(local.log_of(deployment, one.role))
        table.add_row(one.role.name, state, pids, printable(log))
    return table


def _runs(known: list[dict[str, object]], names: dict[str, str]) -> Table:
    table = Table("run", "id", "state", "seconds", "why")
    for one in known[:10]:
        why = str(one.get("status-details", "")).replace("N/A", "")
        seconds = str(one.get("elapsed", "")).partition(".")[0]
        number = str(one.get("run-id"))
        cells = (names.get(number, ""), number, str(one.get("status")), seconds, why)
        table.add_row(*map(printable, cells))
    return table

"""The ``fl-privacy`` command. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console

from fl_privacy.code_digest import PACKAGES
from fl_privacy.component import VERSION, ComponentError, Group
from fl_privacy.deployment import command as deploy_command
from fl_privacy.printable import plain, printable

if TYPE_CHECKING:
    from fl_privacy.settings import Scalar

app = typer.Typer(
    name="fl-privacy",
    help="See what the server of a federated learning system learns about its clients' data.",
    epilog="Start with: fl-privacy simulate --out runs/first --audit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(deploy_command.app, name="deploy")

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or a URL of one.")]
_OTHER_GROUPS = ("strategies", "dp-strategies", "settings")
LocalRun = Annotated[str, typer.Argument(metavar="RUN", help="Run folder on this machine.")]


SPINS = "1000"
"""How often a waiting OpenMP thread looks before it sleeps.

Without it, two threads beside another busy process wait for each other for most of the time (an
attack took 2.4 times as long); alone, it costs 3 to 8 percent.
"""


def main() -> None:
    """Entry point: an error of ours, or of the system, becomes one line.

    The exit status is 2 for bad input, 1 for a failed run.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        app()
    except OSError as error:
        if _debugging():
            raise
        _say_error(f"{_plainly(error)} (fl-privacy --debug ... shows where)")
        sys.exit(1)
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.partition(".")[0] not in PACKAGES or _debugging():
            raise
        _say_error(str(error))
        sys.exit(2 if isinstance(error, ValueError) else 1)


def _say_error(text: str) -> None:
    Console(stderr=True, soft_wrap=True, emoji=False).print(
        f"[bold red]Error:[/] {printable(text)}"
    )


def _plainly(error: OSError) -> str:
    """What the system refused, and of which file: ``/data/x: No space left on device``."""
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what


def _debugging() -> bool:
    return os.environ.get("FL_PRIVACY_DEBUG", "") not in ("", "0")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fl-privacy {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say it and leave."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (also: FL_PRIVACY_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        os.environ["FL_PRIVACY_DEBUG"] = "1"


def _setting(name: str, help: str, default: str) -> Any:
    """An option that overrides a key of the run config; None leaves the key alone."""
    return typer.Option(name, help=help, show_default=default, rich_help_panel="Run settings")


@app.command(
    epilog="""Examples:

fl-privacy simulate --out runs/first --audit

fl-privacy simulate --out runs/noise --audit --defense "gaussian_noise(scale=0.1)" --rounds 5

fl-privacy simulate --out runs/avg --clients 100 --algorithm fedavg --epochs 5 --batch-size 32
--set fraction-train=0.1 --partition "dirichlet(alpha=0.3)"

fl-privacy simulate --out runs/gpu --dataset cifar10 --model convnet64 --client-gpus 0.25"""
)
def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write; must be new.")],
    clients: Annotated[int, typer.Option("--clients", min=1, help="Number of clients.")] = 10,
    rounds: Annotated[int | None, _setting("--rounds", "Rounds to run.", "3")] = None,
    dataset: Annotated[
        str | None, _setting("--dataset", "Where inputs come from.", "fashion-mini")
    ] = None,
    model: Annotated[str | None, _setting("--model", "Network.", "lenet-zhu")] = None,
    partition: Annotated[
        str | None, _setting("--partition", "How clients share the data.", "iid")
    ] = None,
    strategy: Annotated[str | None, _setting("--strategy", "Flower strategy.", "fedavg")] = None,
    algorithm: Annotated[
        str | None, _setting("--algorithm", "fedsgd (one step) or fedavg (epochs).", "fedsgd")
    ] = None,
    lr: Annotated[float | None, _setting("--lr", "Learning rate of clients.", "0.01")] = None,
    batch_size: Annotated[int | None, _setting("--batch-size", "Samples a step.", "1")] = None,
    epochs: Annotated[int | None, _setting("--epochs", "Local epochs (fedavg).", "1")] = None,
    defense: Annotated[
        str | None, _setting("--defense", "Clients' defenses, joined by +.", "none")
    ] = None,
    defended_share: Annotated[
        float | None, _setting("--defended-share", "Share of clients that defend, rounded.", "1.0")
    ] = None,
    audit: Annotated[
        bool | None, _setting("--audit/--no-audit", "Clients keep their truth.", "no-audit")
    ] = None,
    seed: Annotated[int | None, _setting("--seed", "Seed of everything.", "0")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any run setting (fl-privacy list settings); repeat for more.",
            rich_help_panel="Run settings",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last model in --out.")
    ] = False,
    client_cpus: Annotated[int, typer.Option(min=1, help="Cores a client.")] = 1,
    client_gpus: Annotated[float, typer.Option(min=0, help="GPUs a client; 0.25 is fine.")] = 0.0,
    total_cpus: Annotated[int | None, typer.Option(min=1, help="Cores in all.")] = None,
    total_gpus: Annotated[int | None, typer.Option(min=0, help="GPUs in all.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's log.")] = False,
) -> None:
    """Run a federation in Flower's simulation engine, its server recording every update."""
    options = {
        "num-server-rounds": rounds,
        "dataset": dataset,
        "model": model,
        "partition": partition,
        "strategy": strategy,
        "algorithm": algorithm,
        "lr": lr,
        "batch-size": batch_size,
        "local-epochs": epochs,
        "client-defense": defense,
        "client-defended-share": defended_share,
        "audit": audit,
        "seed": seed,
        "resume": resume or None,
    }
    config = run_config(options, set_ or [])
    from fl_privacy import simulation
    from fl_privacy.round_progress import round_progress

    with round_progress(verbose) as stream:
        simulation.simulate(
            config,
            out=out.absolute(),
            clients=clients,
            client_cpus=client_cpus,
            client_gpus=client_gpus,
            total_cpus=total_cpus,
            total_gpus=total_gpus,
            stream=stream,
        )
    from fl_privacy.inspection import recorded

    typer.echo(recorded(out))


def run_config(options: dict[str, Scalar | None], pairs: list[str]) -> dict[str, Scalar]:
    """Options that were given and ``KEY=VALUE`` pairs, validated and typed.

    Raises:
        ComponentError: a pair without ``=``, an unknown key, a wrong value.
    """
    from fl_privacy.settings import parse_settings

    given: dict[str, object] = {k: v for k, v in options.items() if v is not None}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ComponentError(f"--set expects KEY=VALUE, got {pair!r}; such as --set lr=0.1")
        given[key.strip().replace("_", "-")] = value.strip()
    settings = parse_settings(given)
    typed: dict[str, Scalar] = settings.model_dump(by_alias=True, exclude_unset=True)
    return typed


@app.command(
    epilog="""Examples:

fl-privacy inspect runs/first

fl-privacy inspect runs/first --verify"""
)
def inspect(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="Read all and check sums.")] = False,
) -> None:
    """Show what a run recorded: rounds, clients, sizes, model, task, errors."""
    from fl_privacy.inspection import location_of, overview
    from fl_privacy.recording import Recording

    location = location_of(run)
    recording = Recording(location)
    for part in overview(recording):
        Console(soft_wrap=False, emoji=False).print(part)
    if verify:
        _verify(recording)


def _verify(recording: Any) -> None:
    from rich import progress

    with progress.Progress(console=Console(stderr=True, emoji=False), transient=True) as bar:
        task = bar.add_task("checking", total=None)
        problems: list[str] = recording.verify(
            lambda done, total, **_: bar.update(task, completed=done, total=total)
        )
    for problem in problems:
        typer.echo(plain(problem), err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo("Every listed file is intact.")
    for path in recording.unlisted():
        typer.echo(f"Not listed, resuming the run would: {plain(path)}", err=True)


@app.command(
    name="list",
    epilog="""Examples:

fl-privacy list

fl-privacy list defenses

fl-privacy list settings""",
)
def list_(
    group: Annotated[
        str | None,
        typer.Argument(help=f"One of {', '.join([*get_args(Group), *_OTHER_GROUPS])}."),
    ] = None,
) -> None:
    """List what is installed: components with their settings and defaults."""
    from fl_privacy.inspection import groups, listing

    if group is not None and group not in groups():
        raise ComponentError(f"no group {group!r}; there are: {', '.join(groups())}")
    console = Console(emoji=False)
    for name in [group] if group else groups():
        console.print(listing(name))


@app.command(
    epilog="""Examples:

fl-privacy attack runs/first --adversary gradient_similarity

fl-privacy attack runs/first --adversary gradient_similarity --set iterations=500 --targets 32

fl-privacy attack runs/first --adversary analytic --threat-model oracle.toml

fl-privacy attack runs/noise --adaptive --set iterations=300

fl-privacy attack runs/theirs --model their_package.net:build --task task.toml"""
)
def attack(
    run: LocalRun,
    adversary: Annotated[
        str, typer.Option("--adversary", "-a", help="Who attacks (fl-privacy list adversaries).")
    ] = "gradient_similarity",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the adversary; repeat."),
    ] = None,
    threat_model: Annotated[
        Path | None,
        typer.Option("--threat-model", help="TOML file: what the adversary knows and sees."),
    ] = None,
    targets: Annotated[
        int | None, typer.Option(min=1, help="Attack only the first updates.")
    ] = None,
    rounds: Annotated[str, typer.Option(help="Rounds to attack, such as 1-3,10.")] = "",
    node: Annotated[
        list[str] | None, typer.Option(help="Of these targets, those of one client; repeat.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A score more, such as lpips (fl-privacy list metrics); repeat."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    model: Annotated[
        str, typer.Option(help="package.module:factory, for a model of your own.")
    ] = "",
    task: Annotated[
        Path | None, typer.Option(help="TOML file: input_shape, classes, mean, std.")
    ] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Also every adaptation to the clients' defense.")
    ] = False,
) -> None:
    """Attack the recorded updates offline, beside the baseline that guesses; resumable.

    The exit status is 1 when not a single target could be attacked.
    """
    from fl_privacy import attack_command as command
    from fl_privacy.plan import METRICS, Plan

    plan = Plan(
        adversary=command.adversary_spec(adversary, set_ or []),
        threat_model=command.read_threat_model(threat_model),
        metrics=tuple(dict.fromkeys((*METRICS, *(metric or [])))),
        targets=targets,
        rounds=rounds,
        nodes=tuple(node or ()),
        seed=seed,
        device=device,
    )
    folder = command.local_folder(run)
    given = command.read_task(task) if task else None
    if adaptive:
        from fl_privacy import adaptive_attack

        attacked = adaptive_attack.attack_adaptively(folder, plan, model=model, task=given)
        results = attacked.results[0][1], attacked.results[-1][1]
        for text in adaptive_attack.notes(attacked):
            Console(stderr=True, soft_wrap=True, emoji=False).print(printable(text))
        Console(emoji=False).print(adaptive_attack.strengths(attacked))
    else:
        results = command.attack(folder, plan, model=model, task=given)
        Console(emoji=False).print(command.scores(results))
    told = [f"{n} targets not attacked: {why}" for why, n in command.failures(results[0]).items()]
    for text in filter(None, [*told, command.no_scores(results[0])]):
        Console(stderr=True, soft_wrap=True, emoji=False).print(printable(text))
    place = results[0].folder.parent if adaptive else results[0].folder
    typer.echo(f"Results in {place}. Look at them: fl-privacy report {run}")
    if all(row["status"] == "failed" for row in results[0].rows()):
        raise typer.Exit(1)


@app.command(
    epilog="""Examples:

fl-privacy measure runs/faces --auxiliary "npz(path='/data/x.npz', properties=('smiling_{split}',))"

fl-privacy measure runs/faces --audit --metric label_sensitivity --rounds 1,10

fl-privacy measure runs/faces --auxiliary people.npz --metric "v_information(property='smiling')"

fl-privacy measure runs/theirs --audit --model their_package.net:build --task task.toml"""
)
def measure(
    run: LocalRun,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            help="A layer metric (fl-privacy list layer_metrics); repeat.",
            show_default="all that the data allows",
        ),
    ] = None,
    auxiliary: Annotated[
        str,
        typer.Option(
            help="The adversary's data: a dataset, or FILE.npz (docs/layers.md).",
            show_default="the threat model's",
        ),
    ] = "",
    audit: Annotated[
        bool, typer.Option("--audit", help="Measure on the clients' own samples instead.")
    ] = False,
    rounds: Annotated[
        str,
        typer.Option(
            help="At the global models of these rounds, such as 1-3,10.",
            show_default="the last one recorded",
        ),
    ] = "",
    together: Annotated[
        bool, typer.Option("--together", help="One measurement over all of these rounds.")
    ] = False,
    threat_model: Annotated[
        Path | None, typer.Option("--threat-model", help="TOML file: what the server sees.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    model: Annotated[
        str, typer.Option(help="package.module:factory, for a model of your own.")
    ] = "",
    task: Annotated[
        Path | None, typer.Option(help="TOML file: input_shape, classes, mean, std.")
    ] = None,
) -> None:
    """Measure how much each layer of an update tells, at recorded global models; resumable."""
    from fl_privacy import attack_command, measure_command
    from fl_privacy.measuring import MeasurePlan

    plan = MeasurePlan(
        metrics=tuple(metric or ()),
        threat_model=attack_command.read_threat_model(threat_model),
        auxiliary=auxiliary,
        audit=audit,
        rounds=rounds,
        together=together,
        seed=seed,
        device=device,
    )
    folder = attack_command.local_folder(run)
    given = attack_command.read_task(task) if task else None
    for one in measure_command.measure_all(folder, plan, model=model, task=given):
        if one.found is None:
            text = printable(f"Not measured: {one.spec} ({one.why})")
            Console(stderr=True, soft_wrap=True, emoji=False).print(text)
        else:
            Console(emoji=False).print(measure_command.shown(one.found))
    typer.echo(f"Measured. Look at it: fl-privacy report {run}")


@app.command(
    epilog="""Examples:

fl-privacy protect runs/faces --budget 1

fl-privacy protect runs/faces --budget 2 --by label_sensitivity --random 20

fl-privacy protect runs/faces --budget 2 --by v_information --no-attack"""
)
def protect(
    run: LocalRun,
    budget: Annotated[int, typer.Option("--budget", "-k", min=1, help="Layers to withhold.")],
    by: Annotated[
        str,
        typer.Option(
            help="Rank layers by this: auc, or a layer metric that was measured.",
            show_default="auc, if layers were attacked; else the only metric measured",
        ),
    ] = "",
    random: Annotated[
        int, typer.Option("--random", min=2, help="Draws of as many random layers to compare with.")
    ] = 5,
    attack: Annotated[
        bool, typer.Option("--attack/--no-attack", help="Attack again without these layers.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the random layers.")] = 0,
    model: Annotated[
        str, typer.Option(help="package.module:factory, for a model of your own.")
    ] = "",
    task: Annotated[
        Path | None, typer.Option(help="TOML file: input_shape, classes, mean, std.")
    ] = None,
) -> None:
    """Name the layers to withhold, and repeat the run's attacks without them; resumable."""
    from fl_privacy import attack_command, protect_command

    request = protect_command.Request(budget, by, random, seed, attack)
    given = attack_command.read_task(task) if task else None
    folder = attack_command.local_folder(run)
    found, place = protect_command.protect(folder, request, model=model, task=given)
    Console(emoji=False).print(protect_command.shown(found))
    typer.echo(f"Configuration in {place}. Look at it: fl-privacy report {run}")


@app.command(
    epilog="""Examples:

fl-privacy sweep docs/sweeps/quick.toml --out runs/quick

fl-privacy sweep docs/sweeps/fig5-dlg-mnist.toml --out runs/fig5 --dry-run

fl-privacy sweep docs/sweeps/fig5-dlg-mnist.toml --out runs/fig5 --only "soteria-*"
--set "dataset=npz(path='/data/mnist.npz')"

fl-privacy sweep docs/sweeps/fig5-gs-cifar10.toml --out runs/full --full --client-gpus 0.1"""
)
def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="TOML file of the sweep (docs/sweep.md).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the sweep; goes on there.")],
    full: Annotated[bool, typer.Option("--full", help=r"Apply the file's table \[full].")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help=r"A setting of \[run]; or of train.KEY, record.KEY; repeat.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="POINT", help="These points, such as soteria-*.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, list points and work, do nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of attacks: auto, cpu, cuda, cuda:1.")] = "auto",
    client_cpus: Annotated[int, typer.Option(min=1, help="Cores a client.")] = 1,
    client_gpus: Annotated[float, typer.Option(min=0, help="GPUs a client.")] = 0.0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Analyses at once, a process of one thread each; 1: in this process.",
            show_default="cores; on a GPU 1",
        ),
    ] = None,
) -> None:
    """Compare defenses: train, record and attack each at each strength; resumable.

    The exit status is 1 when a point failed; the others are finished all the same.
    """
    from fl_privacy.sweep import command
    from fl_privacy.sweep.tools import RealTools

    request = command.Request(file, out.absolute(), tuple(set_ or ()), full, tuple(only or ()))
    if dry_run:
        for part in command.rehearsed(request, device):
            Console(emoji=False).print(part, highlight=False)
        return
    console = Console(stderr=True, emoji=False)
    tools = RealTools(
        device, {"client_cpus": client_cpus, "client_gpus": client_gpus}, console.print
    )
    at_once = command.workers_for(device, workers)
    page, failed = command.execute(request, tools, console, at_once)
    for where, why in failed.items():
        _say_error(f"{where}: {why}")
    typer.echo(f"Sweep: {page}")
    if failed:
        raise typer.Exit(1)


@app.command(
    epilog="""Examples:

fl-privacy membership --defense "dp_sgd(noise_multiplier=1.0)" --batch-size 8

fl-privacy membership --defense "per_sample_clipping(max_norm=1.0)" --batch-size 8

fl-privacy membership --run runs/private

fl-privacy membership --run runs/private --defense "" --rounds 1 --samples 32"""
)
def membership(
    defense: Annotated[
        str | None,
        typer.Option(
            "--defense",
            help="The client's defenses, joined by +; '' for none.",
            show_default="the run's, or none",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Run whose settings, clients and report this is about."),
    ] = None,
    model: Annotated[str | None, _setting("--model", "Network.", "lenet-zhu")] = None,
    dataset: Annotated[
        str | None, _setting("--dataset", "Where inputs come from.", "fashion-mini")
    ] = None,
    algorithm: Annotated[
        str | None, _setting("--algorithm", "fedsgd (one step) or fedavg (epochs).", "fedsgd")
    ] = None,
    batch_size: Annotated[int | None, _setting("--batch-size", "Samples a step.", "1")] = None,
    epochs: Annotated[int | None, _setting("--epochs", "Local epochs (fedavg).", "1")] = None,
    seed: Annotated[int | None, _setting("--seed", "Seed of everything.", "0")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any run setting; repeat for more.",
            rich_help_panel="Run settings",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="The client's samples.", show_default="the run's, or one batch"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Participations in each trial.", show_default="the run's, or 1"),
    ] = None,
    trials: Annotated[int, typer.Option(min=4, help="Trials with the canary, and without.")] = 1000,
    delta: Annotated[
        float | None,
        typer.Option(help="Delta of both epsilons.", show_default="the defense's, or 1e-5"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")] = None,
) -> None:
    """Test how well a client's update tells whether one sample was there.

    The lower bound on epsilon that this gives stands beside what DP-SGD guarantees. The exit
    status is 1 when the bound is larger, which a correct guarantee does not allow.
    """
    from fl_privacy import membership_command as command
    from fl_privacy.attack_progress import attack_progress
    from fl_privacy.membership_result import FOLDER, write_result

    options: dict[str, Scalar | None] = {
        "model": model,
        "dataset": dataset,
        "algorithm": algorithm,
        "batch-size": batch_size,
        "local-epochs": epochs,
        "seed": seed,
    }
    settings = command.settings_of(run, run_config(options, set_ or []))
    client = command.client_of(run, defense, samples, rounds)
    with attack_progress("membership") as progress:
        result = command.audit(
            settings,
            client.defense,
            samples=client.samples,
            rounds=client.rounds,
            trials=trials,
            delta=delta,
            progress=progress,
        )
    Console(emoji=False).print(command.table(result))
    for file in filter(None, [out, run / FOLDER / result.file_name if run else None]):
        write_result(file, result)
        typer.echo(f"Result in {file}.")
    command.require_kept(result)


@app.command(
    epilog="""Examples:

fl-privacy certs runs/deployed/certs

fl-privacy certs certs --name superlink.example.org --name 192.0.2.7 --nodes 20 --days 90

fl-privacy certs certs --check --name superlink.example.org --nodes 20"""
)
def certs(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to make; nothing is overwritten.")
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name or address of the SuperLink, beside localhost and 127.0.0.1; repeat."
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of SuperNodes.", show_default="2")
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=36500, help="How long certificates are valid.")
    ] = 365,
    check: Annotated[
        bool, typer.Option("--check", help="Make nothing; say what is wrong in DIR.")
    ] = False,
) -> None:
    """Make the certificates and keys of a deployment: authority, SuperLink, SuperNodes.

    The exit status of --check is 1 when something is missing, expired, not signed by the
    authority, not for these names, or open to others.
    """
    from fl_privacy import tls, tls_check

    if not check:
        tls.write_certificates(folder, name or (), nodes=nodes or 2, days=days)
        typer.echo(f"Certificates in {folder}. Keep {folder / tls.CA}.key where nothing runs.")
        return
    found = tls_check.problems(folder, name or (), nodes=nodes or 0)
    for text in found:
        typer.echo(plain(text), err=True)
    if found:
        raise typer.Exit(1)
    typer.echo(f"All is in order until {tls_check.valid_until(folder):%Y-%m-%d}.")


@app.command(
    epilog="""Examples:

fl-privacy report runs/first

fl-privacy report runs/first --pictures 32"""
)
def report(
    run: LocalRun,
    pictures: Annotated[int, typer.Option(min=1, help="Targets to show in each group.")] = 16,
) -> None:
    """Write one self-contained HTML page: pictures, scores, what the adversary knew."""
    from fl_privacy.attack_command import local_folder
    from fl_privacy.report import write_report

    typer.echo(f"Report: {write_report(local_folder(run), pictures=pictures)}")


@app.command(
    epilog="""Examples:

fl-privacy demo

fl-privacy demo --out runs/my-demo"""
)
def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder to write.", show_default="runs/demo, -2, ..."),
    ] = None,
) -> None:
    """Simulate, attack and report in one go: half of the clients defend themselves with noise."""
    from fl_privacy.demo import first_free, run_demo

    folder = (out or first_free(Path("runs/demo"))).absolute()
    typer.echo(f"Report: {run_demo(folder, echo=typer.echo)}")

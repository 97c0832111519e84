"""The commands for devices on machines of their own. Nothing heavy is imported before a command needs it."""

from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core

from hfedmoe.errors import UserError

FLEET = Path("fleet")
"""The server's folder of certificates, keys and roster, unless told otherwise."""
Fleet = Annotated[Path, typer.Option("--fleet", metavar="DIR", help="The folder that `hfedmoe serve init` made.")]


class ConfigOrCommand(typer.core.TyperGroup):
    """`serve init ...` is a command of its own; all else is `serve CONFIG ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments, with the name of the command that runs a config where none is given."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


serve = typer.Typer(cls=ConfigOrCommand, no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(serve, name="serve", help="Run a federation of devices on machines of their own.")
    app.command()(invite)
    app.command()(remove)
    app.command()(status)
    app.command()(stop)
    app.command()(join)


@serve.command("init")
def serve_init(
    host: Annotated[
        str, typer.Argument(help="The name or IP address under which devices reach this server.", metavar="HOST")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port under which they reach it.")] = 8000,
    fleet: Annotated[Path, typer.Option("--fleet", metavar="DIR", help="The folder to make.")] = FLEET,
) -> None:
    """Make certificates and an empty roster for a new fleet of devices."""
    from hfedmoe.fleet.folder import create

    create(fleet, host, port)
    typer.echo(f"{fleet}: a fleet at {host}, port {port}; `hfedmoe invite NAME` invites a device")


@serve.command("run", hidden=True)
def serve_run(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file, or the name of a shipped one (demo, tiny).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for this run; default: runs/<date>-<name>.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with this run instead of beginning one.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    listen: Annotated[str, typer.Option(metavar="IP", help="The address to listen on; default: all.")] = "0.0.0.0",
    check: Annotated[
        bool, typer.Option("--check", help="Only check whether the devices that are here can take part; train nothing.")
    ] = False,
    fleet: Fleet = FLEET,
) -> None:
    """Run a federation with the devices on the roster. Ctrl-C ends it after the round."""
    if check and (resume is not None or out is not None):
        raise UserError("--check: trains nothing and writes nothing; leave --resume and --out out")
    if (config is None) == (resume is None):
        raise UserError("give a config to begin a run, or --resume DIR to go on with one")
    if resume is not None and (out is not None or overrides):
        raise UserError("--resume: a run keeps its folder and its settings; leave --out and --set out")
    from hfedmoe.fleet.folder import opened

    folder = opened(fleet)
    if resume is not None:
        from hfedmoe.runs.existing import require_run

        require_run(resume)
    else:
        from hfedmoe.config.builtin import load_named
        from hfedmoe.runs.folder import RunFolder
        from hfedmoe.runs.refusals import require_settings

        settings = load_named(config, overrides)
        require_settings(settings)
        if out is not None:
            RunFolder.require_free(out)
    from hfedmoe.fleet import serving
    from hfedmoe.report.live import Live

    if check:
        from hfedmoe.fleet.preflight import preflight

        with Live() as live:
            found = preflight(folder, settings, listen, live)
        typer.echo(found.as_text())
        raise typer.Exit(0 if found.fits else 1)
    with Live() as live:
        if resume is not None:
            serving.resume(folder, resume, listen, live)
        else:
            resume = serving.serve(folder, settings, out, listen, live)
    from hfedmoe.report.page.ended import report_of

    report_of(resume)


def invite(
    name: Annotated[str, typer.Argument(help="The device's name.")],
    max_examples: Annotated[
        int | None,
        typer.Option(min=1, help="Most rows that it may count for in averaging; default: only federation.max_weight."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The device's own public key (`ssh-keygen -t ecdsa -b 384`); default: a new key."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the invitation.")] = Path(),
    fleet: Fleet = FLEET,
) -> None:
    """Put a device on the roster and write NAME.invite, the one file that it needs."""
    from hfedmoe.fleet.folder import opened
    from hfedmoe.fleet.invite import invite as write_invitation

    path = write_invitation(opened(fleet), name, out, max_examples, key)
    secret = "" if key is not None else "; it has the device's key, so send it over a safe way and delete it here"
    typer.echo(f"{path}: for {name}{secret}")


def remove(
    name: Annotated[str, typer.Argument(help="The device's name.")],
    fleet: Fleet = FLEET,
) -> None:
    """Take a device off the roster; its invitation ends at once."""
    from hfedmoe.fleet.folder import changing, opened

    folder = opened(fleet)
    with changing(folder) as roster:
        roster.without(name).write(folder.roster)
    typer.echo(f"{name} is removed")


def status(
    fleet: Fleet = FLEET,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the run that is served, and which devices are here."""
    import json

    from hfedmoe.fleet.folder import opened
    from hfedmoe.fleet.status import as_text
    from hfedmoe.fleet.status import status as status_of

    found = status_of(opened(fleet))
    typer.echo(json.dumps(found, indent=2) if as_json else as_text(found))


def stop(
    fleet: Fleet = FLEET,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the end of the round.")] = False,
) -> None:
    """End the run that is served, after its round."""
    from hfedmoe.fleet.folder import opened
    from hfedmoe.fleet.status import stop as stop_serving

    typer.echo(stop_serving(opened(fleet), now))


def join(
    invitation: Annotated[Path, typer.Argument(metavar="FILE", help="The invitation from the server.")],
    data: Annotated[Path, typer.Option(help="This device's own rows, the only ones that are read.")],
    budget: Annotated[
        str, typer.Option(help="Memory (4GiB), a device by name, auto, a share (25%) or a number of experts.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Where this device has the run's model: a folder or hub id. Packaged ones need no option."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This device's private key, if the invitation has none.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Of the rows; default: as in the file.")] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of the rows; default: as in the file.")] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Instead of --model: a folder of models, by the name that a run gives; may be repeated."
        ),
    ] = None,
    max_experts: Annotated[int | None, typer.Option(min=1, help="Most experts, whatever fits.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Most local steps per round.")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=1.0, help="Most seconds of training per round.")] = None,
    min_batch: Annotated[int | None, typer.Option(min=1, help="Fewest rows of a batch.")] = None,
    measure: Annotated[
        bool,
        typer.Option(help="Keep some rows back, and say in counts how good the model is on them."),
    ] = True,
    tune: Annotated[
        bool,
        typer.Option(
            help="Where a run asks for it, train on after its last round for this device itself, which keeps that."
        ),
    ] = True,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="The only columns of the file that a run may read."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="The labels that a run must have, no more and no fewer."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For log files and memory of runs; default: beside the invitation."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check whether this device can take part.")] = False,
    service: Annotated[
        bool, typer.Option("--service", help="Only write a systemd user unit that joins with these options.")
    ] = False,
) -> None:
    """Take part in a federation with this device's own rows, until Ctrl-C."""
    if not invitation.is_file():
        raise UserError(f"{invitation}: no such invitation; ask who runs the server for one, or check the path")
    if not check:  # a check says everything that it finds
        for option, path in (("--data", data), ("--key", key)):
            if path is not None and not path.expanduser().exists():
                raise UserError(f"{option} {path}: no such file")
    from hfedmoe.client.policy import Policy, names_of
    from hfedmoe.config.budgets import budget_of
    from hfedmoe.fleet.allowed import Allowed
    from hfedmoe.fleet.invite import read_invitation

    if model is not None and models:
        raise UserError("--model says where the model of every run is, --models where to look for it; give one of them")
    folders = tuple(str(path.expanduser().absolute()) for path in models) if models else None
    policy = Policy(
        max_experts,
        max_steps,
        max_seconds,
        min_batch,
        folders,
        measure,
        tune,
        None if columns is None else names_of(columns, "--columns"),
        None if labels is None else names_of(labels, "--labels"),
    )
    try:
        allowed = Allowed(data, budget_of(budget), model, encoding, delimiter, policy)
    except ValueError as error:
        raise UserError(f"--budget {error}") from None
    invited = read_invitation(invitation)
    if check:
        from hfedmoe.fleet.check import check as findings_of

        failed = False
        for finding in findings_of(invited, key, allowed):
            failed |= not finding.fits
            typer.echo(finding.line, err=not finding.fits)
        raise typer.Exit(1 if failed else 0)
    if folder is None:
        folder = invitation.with_name(f"{invited.name}.device")
    if service:
        from hfedmoe.fleet.service import write_service

        path, name = write_service(invited.name, invitation, key, allowed, folder)
        typer.echo(f"{path}: written; with it the device joins whenever this machine runs")
        typer.echo("  systemctl --user daemon-reload")
        typer.echo(f"  systemctl --user enable --now {name}")
        typer.echo("  loginctl enable-linger              # also while you are not logged in")
        typer.echo(f"  journalctl --user -u {name.removesuffix('.service')}  # what it says")
        return
    from hfedmoe.fleet.joining import join as take_part

    raise typer.Exit(take_part(invitation, key, allowed, folder))

"""Commands about a run as it goes on: `run`, `resume`, `report`, `watch`, `track`."""

import glob
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.cli.opening import keys_of, load, require_files
from hfedmoe.errors import INTERRUPTED, UserError
from hfedmoe.runs.existing import run_at


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(run)
    app.command()(resume)
    app.command()(report)
    app.command()(watch)
    app.command()(track)


def run(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file, or the name of a shipped one (demo, tiny); default: demo.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for this run; default: runs/<date>-<name>.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print all settings and stop.")] = False,
    show_live: Annotated[
        bool, typer.Option("--live", help="Serve the report on this machine while the run goes on; prints its address.")
    ] = False,
) -> None:
    """Fine-tune a model in a federation of simulated clients."""
    settings = load(config, overrides)
    if show_config:
        from hfedmoe.runs.settings import config_toml

        typer.echo(config_toml(settings), nl=False)
        return
    require_files(settings)
    if out is not None:
        from hfedmoe.runs.folder import RunFolder

        RunFolder.require_free(out)
    from hfedmoe import simulation
    from hfedmoe.report.live import Live

    with ExitStack() as serving, _resumable(out, settings.name), Live() as live:

        def begun(folder: Path) -> None:
            if show_live:
                from hfedmoe.report.page.watching import GRACE_S, served

                typer.echo(f"live report: {serving.enter_context(served(folder, '127.0.0.1', 0, GRACE_S))}")

        folder = simulation.run(settings, out, live, begun)
    _report_of(folder)


def resume(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the run.")]) -> None:
    """Continue a run that was interrupted."""
    run_at(folder)
    from hfedmoe import simulation
    from hfedmoe.report.live import Live

    with _resumable(folder, folder.name), Live() as live:
        simulation.resume(folder, live)
    _report_of(folder)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folder of a run, or of several to compare.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: report.html in the folder of the (first) run.")
    ] = None,
) -> None:
    """Write a page that shows what a run did: it opens in any browser, without a network.

    With several runs, the page shows them beside each other.
    """
    for run in runs:
        run_at(run)
    from hfedmoe.report.page.page import write_report

    typer.echo(write_report(runs, out))


def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, also of one that goes on.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than loopback's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 0,
) -> None:
    """Serve the report of a run while it goes on: the page shows every new round by itself. Ctrl-C ends it."""
    run_at(folder)
    import threading

    from hfedmoe.report.page.watching import served

    with served(folder, host, port) as address:
        typer.echo(f"{address}  (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def track(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that does not go on now.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TRACKING.KEY=VALUE",
            help="Change a setting of [tracking], such as 'tracking.to=[\"mlflow\"]'; may be repeated.",
        ),
    ] = None,
) -> None:
    """Send the rounds of a run to trackers that have not got them."""
    run_at(folder)
    if not all(key.startswith("tracking.") for key in keys_of(overrides)):
        raise UserError("--set: a run keeps its own settings; only tracking.* can change")
    from hfedmoe.config import load_config
    from hfedmoe.report.tracking.afterwards import send_record

    send_record(folder, load_config(folder / "config.toml", overrides), typer.echo)


def _report_of(folder: Path) -> None:
    from hfedmoe.report.page.ended import report_of

    report_of(folder)


@contextmanager
def _resumable(folder: Path | None, name: str) -> Iterator[None]:
    """Say how to continue if the run in `folder` (None: a new one below runs/) is interrupted."""
    pattern = f"*-{glob.escape(name)}*"
    before = set(Path("runs").glob(pattern))
    try:
        yield
    except KeyboardInterrupt:
        found = [folder] if folder is not None else sorted(set(Path("runs").glob(pattern)) - before)
        started = next((path for path in found if (path / "config.toml").is_file()), None)
        way_on = "no run was started" if started is None else f"`hfedmoe resume {shlex.quote(str(started))}` continues"
        typer.echo(f"interrupted; {way_on}", err=True)
        raise typer.Exit(INTERRUPTED) from None

"""The command line: one short function per command. Nothing heavy is imported before a command needs it."""

import re
import sys
from typing import Annotated, NoReturn

import click
import typer
import typer.core
import typer.main

from hfedmoe import __version__
from hfedmoe.cli import bases, comparing, looking, measuring, running, starting, writing
from hfedmoe.errors import INTERRUPTED, UserError
from hfedmoe.fleet import cli as fleet
from hfedmoe.predict import cli as predicting

TYPERS_INTERRUPTED = 130
"""typer's exit code for a KeyboardInterrupt that a command does not catch."""
typer.core.HAS_RICH = False  # else it writes "\\[required]" into the plain help

app = typer.Typer(
    name="hfedmoe",
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would take longer to import than everything else here
    pretty_exceptions_enable=False,
    help="Unequal devices fine-tune one Mixture-of-Experts language model together, without sharing data.",
    epilog="`hfedmoe run` without a config runs the built-in example.",
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point: user errors and interruptions become one line and exit code 2."""
    try:
        code = app(args=arguments, prog_name="hfedmoe", standalone_mode=False)
        if code == TYPERS_INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        code = 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        _say("interrupted")
        code = INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context else _named(arguments)
        text = re.sub(r"( Did you mean [^?]+\?)\1", r"\1", error.format_message())  # from click, and again from typer
        _say(f"error: {text.rstrip('.')}; `{command} --help` explains")
        code = 2
    sys.exit(code)


def _named(arguments: list[str] | None) -> str:
    """The command at the start of the arguments, or `hfedmoe` if there is none."""
    first = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    return f"hfedmoe {first}" if first in getattr(typer.main.get_command(app), "commands", {}) else "hfedmoe"


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hfedmoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _room in (starting, running, measuring, predicting, writing, looking, comparing, fleet, bases):
    _room.register(app)

"""The report at the end of a run."""

from pathlib import Path

import typer

from hfedmoe.errors import UserError
from hfedmoe.report.page.page import write_report


def report_of(folder: Path) -> None:
    """Write the report of a run that has ended and say where; if that fails, the run is good nevertheless."""
    try:
        typer.echo(f"report: {write_report([folder])}")
    except UserError as error:
        typer.echo(f"warning: no report was written: {error}", err=True)

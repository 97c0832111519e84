"""The commands `hfedmoe predict` and, in `chat`, `hfedmoe chat`."""

from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.errors import UserError
from hfedmoe.predict.chat import chat
from hfedmoe.predict.target import check_keys, check_target

ALLOWED = (
    "data.text",
    "data.label",
    "data.choices",
    "data.encoding",
    "data.delimiter",
    "evaluation.batch_size",
    "model.device",
    "model.dtype",
    "model.trust_remote_code",
    "threads",
)
"""Settings that say how the file is written and where the model runs. All others are the run's."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(predict)
    app.command()(chat)


def predict(
    target: Annotated[
        Path,
        typer.Argument(metavar="TARGET", help="A run folder, or the folder of an export: merged, adapter or client."),
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows without labels or answers: CSV, JSONL, Parquet and others.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Result: a .csv, .jsonl or .parquet file; default: FILE's name with .predicted in it."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: best, last or the number of a round; default: best.")
    ] = None,
    label_shares: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|LIST",
            help="How frequent labels are where the rows come from: a labelled file of that site, or shares such as "
            "spam=0.2,ham=0.8. Default: all equally.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A column's name, the device, ...; may be repeated."),
    ] = None,
) -> None:
    """Write the label, or the right choice, of every row of a file, with probabilities."""
    from hfedmoe.predict.written import output_for

    check_keys(overrides, ALLOWED)
    place = check_target(target, checkpoint)
    if not file.expanduser().is_file():
        raise UserError(f"{file}: no such file")
    goal = output_for(file.expanduser(), None if out is None else out.expanduser())
    from hfedmoe.predict.predicting import Asked
    from hfedmoe.predict.predicting import predict as predict_rows
    from hfedmoe.predict.shares import check_shares
    from hfedmoe.report.live import Live

    if label_shares is not None:
        check_shares(label_shares)
    with Live() as live:
        told = predict_rows(Asked(place, file.expanduser(), goal, checkpoint or "best", label_shares, overrides), live)
    typer.echo(told)

"""Commands that write a checkpoint: `export`, `upcycle`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.cli.opening import require_named
from hfedmoe.runs.existing import run_at


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(export)
    app.command()(upcycle)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    out: Annotated[Path, typer.Argument(help="Folder for the result: a new or an empty one.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="FORM",
            help="merged: a transformers checkpoint; adapter: PEFT; client: a client's sub-model, with fewer experts.",
        ),
    ] = "merged",
    client: Annotated[int | None, typer.Option(help="For --as client: the client's number.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="best, last or the number of a round; default: what the client trained for itself after the last "
            "round, with --as client of a run that has that, else best."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's, float32 for an adapter.")
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For --as client: what a device trained for itself, from its own folder."),
    ] = None,
) -> None:
    """Write a result of a run as something that transformers or PEFT loads, with a model card."""
    found = run_at(run)
    from hfedmoe.export.options import check_fits, check_options, check_outside
    from hfedmoe.files.whole import check_free
    from hfedmoe.runs.choice import which_of

    check_options(form, client, dtype, tuned, checkpoint)
    check_outside(out, run)
    check_free(out)
    check_fits(run, found.config, form, client)
    found.require_checkpoint(which_of(checkpoint or "best"))
    from hfedmoe.export.exporting import export_run

    typer.echo(export_run(run, out, form, client, checkpoint, dtype, tuned))


def upcycle(
    dense: Annotated[str, typer.Argument(help="A dense model: packaged, hub id or folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the new checkpoint: a new or an empty one.")],
    experts: Annotated[int, typer.Option(min=2, help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 2,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the new routers.")] = 0,
) -> None:
    """Turn a dense model into a Mixtral checkpoint with equal experts."""
    from hfedmoe.files.whole import check_free

    require_named(dense)
    check_free(out)
    from hfedmoe.export.mixtral import upcycle_to_folder

    upcycle_to_folder(dense, out, experts, top_k, dtype, seed)
    typer.echo(f"{out}: {experts} experts per layer, top-{top_k}; `hfedmoe inspect {shlex.quote(str(out))}` shows it")

"""The command `hfedmoe compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hfedmoe.cli.opening import load, require_files
from hfedmoe.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(compare)


def compare(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file, or the name of a shipped one (demo, tiny); default: demo.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Names from `hfedmoe methods`, with commas; others are tested against the first. A row may have a "
            "setting of its own: hfedmoe@method.layers=even."
        ),
    ] = "hfedmoe,fedavg,random,local,unlimited",
    seeds: Annotated[str, typer.Option(help="For example 0-4, or 0,2,5.")] = "0-4",
    out: Annotated[Path, typer.Option(help="Folder for the result; cells that are there are kept.")] = Path(
        "comparison"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells at once; default: as there is room.")] = None,
    target: Annotated[
        float | None, typer.Option(min=0, max=1, help="Target accuracy; default: 95 % of the first method's.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY=VALUE|VALUE",
            help="Compare at each of these values of a setting; with several, at every combination.",
        ),
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FOLDER", help="Also use the cells of this comparison; may be repeated."),
    ] = None,
    only_stored: Annotated[
        bool, typer.Option("--only-stored", help="Compute nothing: tables and figures of the cells that are there.")
    ] = False,
    on: Annotated[
        Literal["test", "validation"], typer.Option(help="The rows that accuracies in tables and figures are on.")
    ] = "test",
) -> None:
    """Run methods on the same splits, seeds and budgets, and write tables and figures."""
    from hfedmoe.compare.grid import points_of, seeds_of

    seeds_of(seeds)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose another --out")
    for folder in sources or []:
        if not folder.is_dir():
            raise UserError(f"--from {folder}: no such folder")
    points = points_of(vary or [], lambda changes: load(config, [*(overrides or []), *changes]))
    if not only_stored:
        for point in points:
            require_files(point.config)
    from hfedmoe.compare.comparing import Comparison
    from hfedmoe.compare.comparing import compare as run_comparison

    asked = Comparison(methods, seeds, out, jobs, target, sources or [], only_stored, on)
    typer.echo(run_comparison(points, asked))

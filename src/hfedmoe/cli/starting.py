"""The command `hfedmoe init`."""

from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.cli.opening import require_named
from hfedmoe.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(init)


def init(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="A file with rows (CSV, JSONL, Parquet, ...), or one per client."),
    ],
    model: Annotated[
        str, typer.Option(help="A packaged model (smollm2-domains, tiny), a hub id or a folder.")
    ] = "smollm2-domains",
    out: Annotated[Path, typer.Option(help="The config to write.")] = Path("my.toml"),
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="A setting of your own, such as data.label=topic; may be repeated.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the config if it exists.")] = False,
) -> None:
    """Look at your data and a model, and write a config that runs."""
    _check_files(data)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, such as {out / 'my.toml'}")
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; --force replaces it, --out writes another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    require_named(model)
    from hfedmoe.starting.given import given_tree, look_at

    given = given_tree(overrides)
    seen = look_at(data, given)
    from hfedmoe.starting.first import Asked, write_first

    typer.echo(write_first(Asked(data, model, out, given), seen))


def _check_files(data: list[str]) -> None:
    """Raise UserError for anything that is not a file, or named twice."""
    from hfedmoe.config.data import SetName

    for name in data:
        path = Path(name).expanduser()
        if path.is_dir():
            raise UserError(f"{name}: is a folder; name the files in it")
        if not path.is_file():
            known = name in SetName.__args__  # type: ignore[attr-defined]
            way_out = (
                f'; a data set by name needs only data.source = "{name}" in a config (docs/data.md)' if known else ""
            )
            raise UserError(f"{name}: no such file{way_out}")
    if len(set(data)) < len(data):
        raise UserError(f"{next(name for name in data if data.count(name) > 1)}: is named twice; name each file once")

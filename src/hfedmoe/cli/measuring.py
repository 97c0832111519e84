"""The command `hfedmoe evaluate`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.cli.opening import keys_of, load, require_data, require_target
from hfedmoe.errors import UserError
from hfedmoe.runs.existing import is_export, run_at


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(evaluate)


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_MODEL", help="A run folder, an export of a run, or a model (packaged, hub id, folder)."
        ),
    ],
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: best, last or the number of a round; default: best.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="For a model: config with the test rows, or with the columns for --rows; default: demo."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:SUBSET]",
            help="A data set by name instead (piqa, mmlu:anatomy, ...); multiple choice is scored as "
            "lm-evaluation-harness does.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --task or --rows: use only this number of rows, from the first.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="A file; all its rows are used: as the rows of --task NAME, or as your own data with your columns."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change a setting of the config (of a run: only data.*, with --task or --rows); may be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a checkpoint of a run, or a model as it is, on held-out rows or on a data set known by name."""
    of_run = (Path(target) / "config.toml").is_file()
    if of_run and config is not None:
        raise UserError("--config: a run folder has its own config; leave the option out")
    if not of_run and checkpoint is not None:
        raise UserError(f"--checkpoint: {target} is not a run folder (it has no config.toml); leave the option out")
    if task is None and rows is None and limit is not None:
        raise UserError("--limit: needs --task or --rows; for a config, set data.test_rows instead")
    elsewhere = task is not None or rows is not None
    if of_run and overrides and not (elsewhere and all(key.startswith("data.") for key in keys_of(overrides))):
        raise UserError("--set: a run keeps its own settings; only data.* can change, with --task or --rows")
    if task is not None:
        from hfedmoe.data.measured import check_task_name

        check_task_name(task)
    if rows is not None and ":" not in (task or "") and not rows.expanduser().exists():
        raise UserError(f"--rows {rows}: no such file or folder")
    if of_run:
        run_at(Path(target), checkpoint or "best")
    else:
        require_target(target)
        if config is None and not elsewhere and is_export(Path(target).expanduser()):
            raise UserError(f"{target}: an export has no rows; add --rows FILE, or --config with the rows of a config")
        if config is not None:
            settings = load(config, overrides)
            if not elsewhere:
                require_data(settings.data)
    from hfedmoe import measure
    from hfedmoe.config import load_config
    from hfedmoe.data.measured import rows_data, task_data
    from hfedmoe.events import Silent
    from hfedmoe.export.task_file import read_task, with_labels
    from hfedmoe.report.live import Live
    from hfedmoe.report.metrics import as_text, to_json

    with nullcontext(Silent()) if as_json else Live() as live:
        exported = not of_run and is_export(Path(target).expanduser())
        if elsewhere:
            if exported and config is None:
                settings = read_task(Path(target).expanduser(), overrides)
            elif of_run or config is None:
                # Without a config these are the defaults, not the settings of the demo.
                settings = load_config(Path(target) / "config.toml" if of_run else None, overrides)
            else:
                settings = load(config, overrides)
                if exported:
                    settings = with_labels(settings, read_task(Path(target).expanduser()))
            given = {key.split(".")[1] for key in keys_of(overrides) if key.startswith("data.")}
            if task is not None:
                data = task_data(task, settings, limit, rows, given)
            else:
                data = rows_data(rows, settings, limit, given)  # type: ignore[arg-type]
            if of_run:
                metrics = measure.evaluate_run_on(Path(target), checkpoint or "best", data, live)
            else:
                metrics = measure.evaluate_model_on(target, data, settings, live)
        elif of_run:
            metrics = measure.evaluate_run(Path(target), checkpoint or "best", live)
        else:
            settings = load(config, overrides)
            if exported:
                settings = with_labels(settings, read_task(Path(target).expanduser()))
            metrics = measure.evaluate_model(target, settings, live)
    typer.echo(to_json(metrics) if as_json else as_text(metrics))

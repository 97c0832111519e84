"""The command line: one short function per command. Nothing heavy is imported before a command needs it."""

import glob
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import click
import typer
import typer.core
import typer.main

from hfedmoe import __version__
from hfedmoe.errors import UserError
from hfedmoe.fleet import cli as fleet
from hfedmoe.predict import cli as predicting

if TYPE_CHECKING:
    from hfedmoe.config import RunConfig
    from hfedmoe.runs.folder import RunFolder

INTERRUPTED = 2
TYPERS_INTERRUPTED = 130
"""typer's exit code for a KeyboardInterrupt that a command does not catch."""
typer.core.HAS_RICH = False  # else it writes "\\[required]" into the plain help

app = typer.Typer(
    name="hfedmoe",
    add_completion=False,
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


@app.command()
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
    settings = _load(config, overrides)
    if show_config:
        from hfedmoe.runs.settings import config_toml

        typer.echo(config_toml(settings), nl=False)
        return
    _require(settings)
    if out is not None:
        from hfedmoe.runs.folder import RunFolder

        RunFolder.require_free(out)
    from hfedmoe import simulation
    from hfedmoe.report.live import Live

    with ExitStack() as serving, _resumable(out, settings.name), Live() as live:

        def begun(folder: Path) -> None:
            if show_live:
                from hfedmoe.report.page.watching import served

                typer.echo(f"live report: {serving.enter_context(served(folder, '127.0.0.1', 0))}")

        folder = simulation.run(settings, out, live, begun)
    _report_of(folder)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the run.")]) -> None:
    """Continue a run that was interrupted."""
    _run_at(folder)
    from hfedmoe import simulation
    from hfedmoe.report.live import Live

    with _resumable(folder, folder.name), Live() as live:
        simulation.resume(folder, live)
    _report_of(folder)


@app.command()
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
        _run_at(run)
    from hfedmoe.report.page.page import write_report

    typer.echo(write_report(runs, out))


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, also of one that goes on.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than loopback's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 0,
) -> None:
    """Serve the report of a run while it goes on: the page shows every new round by itself. Ctrl-C ends it."""
    _run_at(folder)
    import threading

    from hfedmoe.report.page.watching import served

    with served(folder, host, port) as address:
        typer.echo(f"{address}  (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _report_of(folder: Path) -> None:
    from hfedmoe.report.page.ended import report_of

    report_of(folder)


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file, or the name of a shipped one (demo, tiny); default: demo.")
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="BUDGET",
            help="Memory (4GiB), a device by name, auto, a share (25%) or a number of experts; may be repeated. "
            "Default: the budgets of the config's clients.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model instead of the config's: a hub id or a folder, not upcycled.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the devices known by name and stop.")] = False,
) -> None:
    """Show which devices can take part, their number of experts, memory and time. Loads no weights."""
    if presets:
        from hfedmoe.report import device_presets as listed

        typer.echo(listed.to_json() if as_json else listed.as_text())
        return
    settings = _load(config, overrides)
    if model is not None:
        changed = settings.model.model_copy(update={"name": model, "upcycle": None})
        if "model.revision" not in _keys(overrides):
            changed = changed.model_copy(update={"revision": None})  # it belongs to the config's own model
        settings = settings.model_copy(update={"model": changed})
    from hfedmoe.runs.refusals import require_model

    require_model(settings.model)
    from hfedmoe.report.plan import plan_for, to_json
    from hfedmoe.report.plan_text import as_text

    planned = plan_for(settings, devices)
    typer.echo(to_json(planned) if as_json else as_text(planned))


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A packaged model (smollm2, smollm2-domains, tiny), a hub id or a folder.")
    ],
    upcycle_experts: Annotated[
        int | None, typer.Option(min=2, help="Show a dense model as if upcycled to this number of experts per layer.")
    ] = None,
    upcycle_top_k: Annotated[int, typer.Option(min=1, help="Experts per token of the upcycled model.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the MoE anatomy of a model: layers, experts, routers, and bytes by kind. Loads no weights."""
    _require_model(model)
    from hfedmoe.report.inspection import anatomy_of, as_text, to_json

    anatomy = anatomy_of(model, upcycle_experts, upcycle_top_k)
    typer.echo(to_json(anatomy) if as_json else as_text(anatomy))


@app.command()
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
    if of_run and overrides and not (elsewhere and all(key.startswith("data.") for key in _keys(overrides))):
        raise UserError("--set: a run keeps its own settings; only data.* can change, with --task or --rows")
    if rows is not None and ":" not in (task or "") and not rows.expanduser().exists():
        raise UserError(f"--rows {rows}: no such file or folder")
    if of_run:
        _run_at(Path(target), checkpoint or "best")
    else:
        _require_target(target)
        if config is None and not elsewhere and (Path(target).expanduser() / "hfedmoe.json").is_file():
            raise UserError(f"{target}: an export has no rows; add --rows FILE, or --config with the rows of a config")
    from hfedmoe import measure
    from hfedmoe.config import load_config
    from hfedmoe.data.measured import rows_data, task_data
    from hfedmoe.events import Silent
    from hfedmoe.export.task_file import is_export, read_task, with_labels
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
                settings = _load(config, overrides)
                if exported:
                    settings = with_labels(settings, read_task(Path(target).expanduser()))
            given = {key.split(".")[1] for key in _keys(overrides) if key.startswith("data.")}
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
            settings = _load(config, overrides)
            if exported:
                settings = with_labels(settings, read_task(Path(target).expanduser()))
            metrics = measure.evaluate_model(target, settings, live)
    typer.echo(to_json(metrics) if as_json else as_text(metrics))


predicting.register(app)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the methods that method.name can name: what a client holds, trains and sends in each."""
    from hfedmoe.report import method_list as listed

    typer.echo(listed.to_json() if as_json else listed.as_text())


@app.command()
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
    from hfedmoe.compare.grid import points_of

    points = points_of(vary or [], lambda changes: _load(config, [*(overrides or []), *changes]))
    if not only_stored:
        for point in points:
            _require(point.config)
    from hfedmoe.compare.comparing import Comparison
    from hfedmoe.compare.comparing import compare as run_comparison

    asked = Comparison(methods, seeds, out, jobs, target, sources or [], only_stored, on)
    typer.echo(run_comparison(points, asked))


@app.command()
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
    checkpoint: Annotated[str, typer.Option(help="best, last or the number of a round.")] = "best",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's, float32 for an adapter.")
    ] = None,
) -> None:
    """Write a result of a run as something that transformers or PEFT loads, with a model card."""
    found = _run_at(run)
    from hfedmoe.export.options import check_fits, check_options, check_outside
    from hfedmoe.files.whole import check_free
    from hfedmoe.runs.choice import which_of

    check_options(form, client, dtype)
    check_outside(out, run)
    check_free(out)
    check_fits(run, found.config, form, client)
    found.require_checkpoint(which_of(checkpoint))
    from hfedmoe.export.exporting import export_run

    typer.echo(export_run(run, out, form, client, checkpoint, dtype))


@app.command()
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

    _require_model(dense)
    check_free(out)
    from hfedmoe.export.mixtral import upcycle_to_folder

    upcycle_to_folder(dense, out, experts, top_k, dtype, seed)
    typer.echo(f"{out}: {experts} experts per layer, top-{top_k}; `hfedmoe inspect {shlex.quote(str(out))}` shows it")


base = typer.Typer(no_args_is_help=True, help="Build and check base models whose experts belong to domains.")
app.add_typer(base, name="base")


@base.command("pretrain")
def base_pretrain(
    out: Annotated[Path, typer.Argument(help="Folder for the model: a new or an empty one.")],
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps; the same command goes on if it was stopped.")
    ] = 3000,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the texts.")] = 0,
) -> None:
    """Pre-train a small OLMoE model from packaged texts, with experts that belong to domains."""
    from hfedmoe.files.whole import check_free

    check_free(out)
    from hfedmoe.bases.building import pretrain_base

    typer.echo(pretrain_base(out, steps, seed))


@base.command("branches")
def base_branches(
    out: Annotated[Path, typer.Argument(help="Folder for the model: a new or an empty one.")],
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of each branch; the same command goes on if it was stopped.")
    ] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the changes and of the order of the texts.")] = 0,
) -> None:
    """Branch the upper layers of SmolLM2-135M into experts that belong to domains."""
    from hfedmoe.files.whole import check_free

    check_free(out)
    from hfedmoe.bases.building import branch_base

    typer.echo(branch_base(out, steps, seed))


@base.command("questions")
def base_questions(
    out: Annotated[Path, typer.Argument(help="Folder for the rows: a new or an empty one.")],
    seed: Annotated[int, typer.Option(min=0, help="Of what is asked.")] = 0,
) -> None:
    """Make multiple-choice questions from packaged texts: which of four passages goes on where a text stops?"""
    from hfedmoe.files.whole import check_free

    check_free(out)
    from hfedmoe.bases.questions import write_questions

    typer.echo(write_questions(out, seed))


@base.command("check")
def base_check(
    model: Annotated[str, typer.Argument(help="A MoE model: packaged, hub id or folder.")],
    texts: Annotated[int, typer.Option(min=1, help="Held-out texts of each domain.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure whether it matters which experts of a model a text is given; exit code 1 if it does not."""
    _require_model(model)
    from hfedmoe.bases.building import check_base

    text, passed = check_base(model, texts, as_json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


fleet.register(app)


@app.command()
def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also try to reach the model hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is installed, what can run, and how to get what is missing. Exit code 1 if nothing can run."""
    from hfedmoe.doctor import as_text, examine, to_json

    report = examine(hub)
    typer.echo(to_json(report) if as_json else as_text(report))
    raise typer.Exit(0 if report.fit else 1)


def _load(config: Path | None, overrides: list[str] | None) -> "RunConfig":
    from hfedmoe.config.builtin import load_named

    return load_named(config, overrides)


def _require(settings: "RunConfig") -> None:
    """Raise UserError at once if files that the settings name do not exist."""
    from hfedmoe.runs.refusals import require_data, require_model

    require_model(settings.model)
    require_data(settings.data)


def _run_at(folder: Path, checkpoint: str | None = None) -> "RunFolder":
    """The run in a folder. Raises UserError at once if there is none, it is damaged, or has no such checkpoint."""
    from hfedmoe.runs.existing import require_run

    require_run(folder)
    from hfedmoe.runs.choice import which_of
    from hfedmoe.runs.folder import RunFolder

    found = RunFolder.open(folder)
    if checkpoint is not None:
        found.require_checkpoint(which_of(checkpoint))
    return found


def _require_model(name: str) -> None:
    """Raise UserError at once if a model's name is a path that does not exist or is not a model."""
    from hfedmoe.config import ModelConfig
    from hfedmoe.runs.refusals import require_model

    require_model(ModelConfig(name=name))


def _require_target(target: str) -> None:
    """As `_require_model`, for a target that may have been meant as a run."""
    path = Path(target).expanduser()
    if (path / "hfedmoe.json").is_file():  # an export, perhaps of an adapter
        return
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{target}: neither a run folder (no config.toml) nor a model (no config.json)")
    from hfedmoe.runs.existing import meant_as_run, require_run

    if meant_as_run(path):
        require_run(path)
    _require_model(target)


def _keys(overrides: list[str] | None) -> list[str]:
    """The keys that `--set` names."""
    return [text.partition("=")[0].strip() for text in overrides or []]


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
        _say(f"interrupted; {way_on}")
        raise typer.Exit(INTERRUPTED) from None

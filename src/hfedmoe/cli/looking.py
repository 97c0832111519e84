"""Commands that show something and change nothing: `plan`, `inspect`, `methods`, `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.cli.opening import keys_of, load, require_named


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(plan)
    app.command()(inspect)
    app.command()(methods)
    app.command()(doctor)


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
    settings = load(config, overrides)
    if model is not None:
        changed = settings.model.model_copy(update={"name": model, "upcycle": None})
        if "model.revision" not in keys_of(overrides):
            changed = changed.model_copy(update={"revision": None})  # it belongs to the config's own model
        settings = settings.model_copy(update={"model": changed})
    from hfedmoe.models.dense import refuse_dense
    from hfedmoe.runs.refusals import require_model

    require_model(settings.model)
    refuse_dense(settings.model)
    from hfedmoe.report.plan import plan_for, to_json
    from hfedmoe.report.plan_text import as_text

    planned = plan_for(settings, devices)
    typer.echo(to_json(planned) if as_json else as_text(planned))


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
    require_named(model)
    from hfedmoe.report.inspection import anatomy_of, as_text, to_json

    anatomy = anatomy_of(model, upcycle_experts, upcycle_top_k)
    typer.echo(to_json(anatomy) if as_json else as_text(anatomy))


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the methods that method.name can name: what a client holds, trains and sends in each."""
    from hfedmoe.report import method_list as listed

    typer.echo(listed.to_json() if as_json else listed.as_text())


def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also try to reach the model hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is installed, what can run, what is missing, and what to do next. Exit code 1 if nothing can run."""
    from hfedmoe.doctor import as_text, examine, to_json

    report = examine(hub)
    typer.echo(to_json(report) if as_json else as_text(report))
    raise typer.Exit(0 if report.fit else 1)

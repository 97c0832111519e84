"""The command `hfedmoe chat`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfedmoe.errors import UserError
from hfedmoe.predict.target import check_keys, check_target

if TYPE_CHECKING:
    from hfedmoe.predict.answering import Answerer, Message

ALLOWED = ("model.device", "model.dtype", "model.trust_remote_code", "threads")
"""Settings that say where the model runs."""
SHOWN = 10
"""Labels that are shown for a text."""


def chat(
    target: Annotated[
        Path,
        typer.Argument(metavar="TARGET", help="A run folder, or the folder of an export: merged, adapter or client."),
    ],
    text: Annotated[str | None, typer.Option(help="One text or prompt; default: every line of the input.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: best, last or the number of a round; default: best.")
    ] = None,
    most_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens of an answer.")] = 128,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="The device, ...; may be repeated."),
    ] = None,
) -> None:
    """Try the trained model: the labels of a text with their probabilities, or an answer to a prompt."""
    check_keys(overrides, ALLOWED)
    place = check_target(target, checkpoint)
    if text is not None and not text.strip():
        raise UserError("--text: is empty; write a text or a prompt")
    from hfedmoe.predict.answering import open_answerer

    asked = open_answerer(place, checkpoint or "best", overrides)
    if text is not None:
        _answer(asked, [("user", text)], most_tokens)
        return
    talk: list[Message] = []
    for line in _lines(asked):
        if not line.strip():
            talk = []  # a new conversation
            continue
        talk.append(("user", line))
        said = _answer(asked, talk, most_tokens)
        talk = [*talk, ("assistant", said)] if asked.talks and said else []


def _lines(asked: "Answerer") -> Iterator[str]:
    """The lines of the input; at a terminal with a prompt."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    what = "a text for its labels" if asked.labels else "a prompt"
    more = "; an empty line begins a new conversation" if asked.talks else ""
    typer.echo(f"Write {what}{more}. Ctrl-D ends.", err=True)
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo("", err=True)
            return


def _answer(asked: "Answerer", talk: "list[Message]", most_tokens: int) -> str:
    """Print the answer to the last message; returns what the model wrote, if it did."""
    if asked.labels:
        shares = list(asked.label_shares([talk[-1][1]])[0].items())
        more = f"  and {len(shares) - SHOWN} more labels" if len(shares) > SHOWN else ""
        typer.echo("  ".join(f"{label} {100 * share:.1f} %" for label, share in shares[:SHOWN]) + more)
        return ""
    said = asked.answer(talk, most_tokens, lambda piece: typer.echo(piece, nl=False))
    typer.echo("")
    return said

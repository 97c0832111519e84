"""The list of methods for `hfedmoe methods` and docs/methods.md."""

import json
import math
import textwrap
from collections.abc import Iterator
from typing import Any

from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Method, Option
from hfedmoe.report.table import WIDTH

STATUS = {
    "full text": "implemented from the full text",
    "secondary": "implemented from descriptions by others",
    "abstract": "implemented from the abstract",
    "bound": "not a method: a limit to compare methods with",
    "own": "ours, and in no paper",
}


def as_text() -> str:
    """Each method with what a client holds, trains and sends, and what the server makes of it."""
    return "\n".join(line for name, row in METHODS.items() for line in _described(name, row)).rstrip()


def to_json() -> str:
    """The same as JSON."""
    return json.dumps({name: _facts(row) for name, row in METHODS.items()}, indent=2)


def as_markdown() -> str:
    """The same as tables of docs/methods.md."""
    lines = ["| `method.name` | a client holds | trains | sends | the server |", "|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {row.holds} | {row.trains} | {row.travels} | {row.server} |" for name, row in METHODS.items()
    ]
    lines += ["", "| `method.name` | source | status | `method.options` |", "|---|---|---|---|"]
    for name, row in METHODS.items():
        options = "; ".join(f"`{option.name}` ({option.usual:g}): {option.about}" for option in row.options)
        lines.append(f"| `{name}` | {row.source} | {STATUS[row.status]} | {options} |")
    return "\n".join(lines)


def _described(name: str, row: Method) -> Iterator[str]:
    yield f"{name}  ({row.source}; {STATUS[row.status]})"
    for what, text in (("holds", row.holds), ("trains", row.trains), ("sends", row.travels), ("server", row.server)):
        yield from textwrap.wrap(
            f"  {what:7} {text}", WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False, drop_whitespace=True
        )
    for option in row.options:
        yield f"  method.options.{option.name} = {option.usual:g}  {option.about}{_range(option)}"
    yield ""


def _range(option: Option) -> str:
    return f" (from {option.low:g})" if math.isinf(option.high) else f" ({option.low:g} to {option.high:g})"


def _facts(row: Method) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "holds": row.holds,
        "trains": row.trains,
        "sends": row.travels,
        "server": row.server,
        "source": row.source,
        "status": row.status,
        "private": sorted(row.private),
        "options": {option.name: {"default": option.usual, "about": option.about} for option in row.options},
    }
    return facts

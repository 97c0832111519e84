"""about.json and answers.jsonl: what a report says of a run besides its figures.

about.json is written when a run begins, and when a client comes: the machine, how many rows and what budget each client
has and with which labels (only where this process split the rows), and of the held-out rows the right answers and a few
texts. The server measures these rows itself, so they are its own. answers.jsonl has a line per evaluation on all
held-out rows: what the model answered.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.events import Participant
from hfedmoe.files.disk import replacing
from hfedmoe.runs import rounds

NAME, ANSWERS = "about.json", "answers.jsonl"
TEXTS = 200
"""Held-out rows whose texts are kept, the first ones."""
LONGEST = 400
"""Characters of such a text."""


@dataclass
class Part:
    """What one client has."""

    client: int
    name: str
    rows: int
    labels: list[int] = field(default_factory=list)
    """Rows of each label; empty: rows have none, or only the device knows."""
    budget: int | None = None
    """Experts over all layers, as the client told last; None: it did not take part yet."""


@dataclass
class About:
    """What is known when a run begins."""

    machine: dict[str, Any] = field(default_factory=dict)
    """Of the server: processor, threads, device, memory, system."""
    labels: list[str] = field(default_factory=list)
    """In classification; else empty."""
    parts: list[Part] = field(default_factory=list)
    """Of every client where this process split the rows; else of those that took part."""
    truth: list[int] = field(default_factory=list)
    """The right answer of each held-out row, as an index into its choices; empty for completions."""
    texts: list[str] = field(default_factory=list)
    """Of the first held-out rows, cut."""
    choices: list[list[str]] = field(default_factory=list)
    """Of the same rows in multiple choice, cut; empty where all rows have the same choices (`labels`) or none."""


def cut(text: str) -> str:
    """A text that is not longer than `LONGEST`."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def write(folder: Path, about: About) -> None:
    """Write about.json, whole or not at all."""
    with replacing(folder / NAME) as file:
        file.write(json.dumps(asdict(about), ensure_ascii=False).encode() + b"\n")


def read(folder: Path) -> About:
    """What is known of a run; without the file, as in runs of earlier versions, nothing.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        known = {entry.name: tree[entry.name] for entry in fields(About) if entry.name in tree}
        return About(**known | {"parts": [Part(**part) for part in tree.get("parts", ())]})
    except FileNotFoundError:
        return About()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it: only the report needs it") from None


def note_clients(folder: Path, clients: Mapping[int, Participant]) -> None:
    """Add clients that take part, by number, and what they say of themselves; what is known of their rows stays.

    Raises:
        UserError: the file is damaged.
    """
    known = read(folder)
    parts = {part.client: part for part in known.parts}
    for client, who in clients.items():
        parts.setdefault(client, Part(client, who.name, who.examples)).budget = who.budget
    known.parts = [parts[client] for client in sorted(parts)]
    write(folder, known)


def append_answers(folder: Path, round: int, predicted: Sequence[int]) -> None:
    """Add what the model of a round answered to each held-out row, as indices into its choices."""
    rounds.append(folder / ANSWERS, {"round": round, "predicted": list(predicted)})


def answers(folder: Path) -> list[tuple[int, list[int]]]:
    """(round, answers) of every evaluation, in order."""
    return [(line["round"], line["predicted"]) for line in rounds.iterate(folder / ANSWERS)]

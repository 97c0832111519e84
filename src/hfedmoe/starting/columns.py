"""Say which column of a table is the text, the label or the answer, and why."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from hfedmoe.config.data import DataFormat
from hfedmoe.data.known import KNOWN
from hfedmoe.data.known.conversations import REQUESTS, TURNS
from hfedmoe.data.normal import key_of
from hfedmoe.data.rows import Rows
from hfedmoe.errors import UserError

TEXTS = "text texts body content message review sentence document article comment post description tweet email abstract"
TEXTS += " utterance question prompt query input"
LABELS = "label labels category class topic sentiment intent tag target stance rating answer type"
ASKED = "prompt question query instruction input source text document article dialogue context"
ANSWERED = "completion response answer output target reply summary translation"
CHOICES, ANSWER = "choices options", "answer label correct gold"
SITES = (
    "client client_id site site_id device device_id hospital clinic branch store centre center institution user user_id"
)
MOST_LABELS = 60
LONGEST_LABEL = 60
"""Characters."""
MOST_SITES = 32
FEWEST_ROWS = 8
"""Of a value that names a client."""


@dataclass(frozen=True)
class Column:
    """What the cells of a column are."""

    name: str
    filled: int
    texts: bool
    """Whether all of them are text."""
    names: bool
    """Whether all of them could name something: short texts, whole numbers, true and false."""
    values: Counter[str]
    """How often each value occurs, if the cells could be names."""
    letters: float
    """Mean length of the texts."""

    @property
    def repeats(self) -> bool:
        """Whether it looks like a label: a few values, each in many rows."""
        return self.names and 1 <= len(self.values) <= min(MOST_LABELS, max(2, self.filled // 3))


@dataclass(frozen=True)
class Roles:
    """The columns of a task, as settings of section [data], and a word on each choice."""

    format: DataFormat
    columns: dict[str, str]
    """Setting (`text`, `label`, `choices`, `answer`, `completion`) -> column."""
    why: dict[str, str]
    site: str | None = None
    """The column that names the client."""


def columns_of(rows: Rows) -> dict[str, Column]:
    """All columns of a table by name."""
    return {name: _column(name, cells) for name, cells in rows.columns.items()}


def _column(name: str, cells: list[Any]) -> Column:
    filled = [cell for cell in cells if cell is not None and cell != "" and cell == cell]  # NaN is not itself
    texts = bool(filled) and all(isinstance(cell, str) for cell in filled)
    names = bool(filled) and all(_could_name(cell) for cell in filled)
    values = Counter(key_of(cell) for cell in filled) if names else Counter[str]()
    letters = sum(len(str(cell)) for cell in filled) / len(filled) if texts else 0.0
    return Column(name, len(filled), texts, names, values, letters)


def _could_name(cell: Any) -> bool:
    if isinstance(cell, str):
        return len(cell) <= LONGEST_LABEL and not re.fullmatch(r"-?\d+\.\d*[1-9]\d*", cell.strip())
    return isinstance(cell, bool | int) or (isinstance(cell, float) and cell.is_integer())


def roles_of(rows: Rows, given: dict[str, str]) -> Roles:
    """What the columns are, found from their names and cells.

    Args:
        given: what the user said of section [data]: columns and format.

    Raises:
        UserError: no column has texts, or none has labels, answers or conversations; or several could be the label.
    """
    columns = columns_of(rows)
    for setting, name in given.items():
        if setting != "format" and name not in columns:
            raise UserError(
                f'--set data.{setting}={name}: no column "{name}" in {rows.origin}; its columns: {", ".join(columns)}'
            )
    form = given.get("format", "auto")
    if form in KNOWN:
        return _known(rows, form)
    if form == "auto" and not given:
        if any(_talks(rows.columns.get(name)) for name in (*TURNS, "prompt")):
            return Roles("instructions", {}, {"text": "they hold lists of messages"})
        known = next((known.name for known in KNOWN.values() if known.kind == "choices" and known.reads(rows)), None)
        if known is not None:
            return _known(rows, known)
        asks, _, answers = REQUESTS[0]
        if asks in columns and any(name in columns for name in answers):
            return Roles("instructions", {}, {"text": "columns of instructions and their answers"})
    if not any(column.texts for column in columns.values()):
        raise UserError(f"{rows.origin}: no column has texts; its columns: {', '.join(rows.names) or 'none'}")
    found = _choices(rows, columns, given) or _completion(columns, given, sure=True) or _labels(rows, columns, given)
    found = found or _completion(columns, given, sure=False)
    if found is None:
        raise UserError(
            f"{rows.origin}: no column has labels, answers or conversations to learn; its columns: "
            f"{', '.join(rows.names)}; if one does, name it: --set data.label=COLUMN, or --set data.completion=COLUMN"
        )
    return found


def _known(rows: Rows, name: str) -> Roles:
    if not KNOWN[name].reads(rows):
        raise UserError(f"--set data.format={name}: {rows.origin} has other columns ({', '.join(rows.names)})")
    return Roles(name, {}, {"text": f"the columns of {name}"})  # type: ignore[arg-type]


def _talks(cells: list[Any] | None) -> bool:
    """Whether cells are lists of messages."""
    first = next((cell for cell in cells or [] if cell is not None), None)
    return isinstance(first, list) and bool(first) and isinstance(first[0], dict)


def _choices(rows: Rows, columns: dict[str, Column], given: dict[str, str]) -> Roles | None:
    listed = [name for name, cells in rows.columns.items() if cells and all(map(_is_list, cells))]
    if given.get("format", "choices") not in ("auto", "choices"):
        return None
    choices = given.get("choices") or _first_named(CHOICES, listed)
    answer = given.get("answer") or _first_named(ANSWER, columns)
    text = given.get("text") or _text(columns, {str(choices), str(answer)})[0]
    if choices is None or answer is None or text is None:
        return None
    why = "a list of choices in every row"
    return Roles("choices", {"text": text, "choices": choices, "answer": answer}, {"choices": why})


def _is_list(cell: Any) -> bool:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return False
    return isinstance(cell, list) and all(isinstance(choice, str) for choice in cell)


def _completion(columns: dict[str, Column], given: dict[str, str], sure: bool) -> Roles | None:
    """Prompts and completions; `sure`: only where the user or the columns' names say so."""
    if "label" in given or given.get("format", "completion") not in ("auto", "completion"):
        return None
    texts = [name for name, column in columns.items() if column.texts]
    asked = "completion" in given or given.get("format") == "completion" or "completion" in texts
    if sure and not asked:
        return None
    answer = given.get("completion") or _first_named(ANSWERED, texts)
    text = given.get("text") or _first_named(ASKED, [name for name in texts if name != answer])
    if answer is None or text is None:
        return None
    return Roles("completion", {"text": text, "completion": answer}, {"completion": "what follows the prompt"})


def _labels(rows: Rows, columns: dict[str, Column], given: dict[str, str]) -> Roles | None:
    if given.get("format", "classification") not in ("auto", "classification"):
        return None
    whole = [name for name, column in columns.items() if column.filled == len(rows)]
    site = _site(columns, whole)
    repeating = [name for name in whole if columns[name].repeats and name not in (given.get("text"), site)]
    named = _first_named(LABELS, repeating)
    label = given.get("label") or named
    if label is None:
        text, _ = _text(columns, {str(site)})
        left = [name for name in repeating if name != text and len(columns[name].values) > 1]
        if len(left) > 1:
            raise UserError(
                f"{rows.origin}: several columns could be the label ({', '.join(left)}); name one: --set "
                f"data.label={left[0]}"
            )
        label = left[0] if left else None
    if label is None:
        return None
    column = columns[label]
    if len(column.values) == 1:
        raise UserError(
            f'{rows.origin}: every row has the same value in the column "{label}", so there is nothing to learn; name '
            "the column of the label with --set data.label=COLUMN, or add rows with other labels"
        )
    text, why = _text(columns, {label, str(site)})
    text = given.get("text") or text
    if text is None:
        raise UserError(f'{rows.origin}: no column has texts beside the labels in "{label}"; add one')
    said = "you said so" if "label" in given else "its name" if named else "no other column has values that repeat"
    whys = {"text": "you said so" if "text" in given else why, "label": said}
    return Roles("classification", {"text": text, "label": label}, whys, site if site != text else None)


def _text(columns: dict[str, Column], others: set[str]) -> tuple[str | None, str]:
    """The column of the texts, and why."""
    able = {name: column.letters for name, column in columns.items() if column.texts and name not in others}
    if not able:
        return None, ""
    longest = max(able, key=lambda name: able[name])
    named = _first_named(TEXTS, able)
    if named is not None and able[named] >= able[longest] / 4:  # a column "text" with a word in it is not the text
        return named, "its name"
    return longest, "the longest texts"


def _site(columns: dict[str, Column], whole: Iterable[str]) -> str | None:
    """The column that names the client: by its name, with at least two values, each in enough rows."""
    name = _first_named(SITES, whole)
    if name is None or not columns[name].names:
        return None
    counts = columns[name].values.values()
    return name if 2 <= len(counts) <= MOST_SITES and min(counts) >= FEWEST_ROWS else None


def _first_named(names: str, there: Collection[str] | Iterable[str]) -> str | None:
    """The first of `names` that a column has, whatever its capitals."""
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(list(there))}
    return next((plain[name] for name in names.split() if name in plain), None)

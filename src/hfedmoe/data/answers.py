"""Find the right choice of every row: the answer column holds indices, letters or texts.

In a CSV file every cell is text, and choices may be numbers or letters themselves: with the choices 1, 2 and 3, the
answer 1 may be a text or an index. So the whole column decides, not a single cell.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.normal import normal
from hfedmoe.data.rows import Rows, short, text_of
from hfedmoe.errors import UserError

WHOLE = re.compile(r"\d+(\.0*)?")
"""A whole number as text; pandas writes 1 as 1.0 if another row of the column is empty."""


def answer_indices(rows: Rows, choices: Sequence[tuple[str, ...]], config: DataConfig) -> list[int]:
    """The index of the right choice in every row.

    `data.answers` says what the column holds. With auto, numbers in JSON and Parquet are indices. Text is read as the
    text of a choice, a number from 0 or a letter from A: the reading that fits all rows, else each row by itself.

    Raises:
        UserError: a cell has no such reading, or two that give different choices.
    """
    column = config.answer
    cells = rows.column(column, "data.answer")
    texts: dict[int, str] = {}
    found: dict[int, int] = {}
    for i, cell in enumerate(cells):
        number = _number(cell)
        if number is None or config.answers == "text":
            texts[i] = str(number) if number is not None else _text(cell, rows, i, column)
        elif 0 <= number < len(choices[i]):
            found[i] = number
        else:
            raise UserError(
                f"{_where(rows, i, column)} is {number}, but the {len(choices[i])} choices are numbered 0 to "
                f'{len(choices[i]) - 1}; if it is the text of a choice, set data.answers = "text"'
            )
    readings = [read for name, read in READINGS if config.answers in ("auto", name)]
    whole = [read for read in readings if all(read(text, choices[i]) for i, text in texts.items())]
    for i, text in texts.items():
        meant = {index for read in whole or readings for index in read(text, choices[i])}
        if len(meant) != 1:
            raise _unclear(_where(rows, i, column), text, choices[i], config)
        found[i] = meant.pop()
    return [found[i] for i in range(len(rows))]


def _by_text(text: str, choices: tuple[str, ...]) -> list[int]:
    exact = [index for index, choice in enumerate(choices) if choice == text]
    # choices may differ only in what `normal` drops: in code, the number of spaces counts
    return exact or [index for index, choice in enumerate(choices) if normal(choice) == normal(text)]


def _by_number(text: str, choices: tuple[str, ...]) -> list[int]:
    number = int(text.split(".")[0]) if WHOLE.fullmatch(text) else -1
    return [number] if 0 <= number < len(choices) else []


def _by_letter(text: str, choices: tuple[str, ...]) -> list[int]:
    index = ord(text.upper()) - ord("A") if len(text) == 1 and text.isalpha() and text.isascii() else -1
    return [index] if 0 <= index < len(choices) else []


READINGS: tuple[tuple[str, Callable[[str, tuple[str, ...]], list[int]]], ...] = (
    ("text", _by_text),
    ("index", _by_number),
    ("index", _by_letter),
)


def _number(cell: Any) -> int | None:
    whole = isinstance(cell, int) and not isinstance(cell, bool)
    return int(cell) if whole or (isinstance(cell, float) and cell.is_integer()) else None


def _text(cell: Any, rows: Rows, index: int, column: str) -> str:
    if isinstance(cell, bool):
        raise UserError(
            f"{_where(rows, index, column)} is {short(cell)}; write the index of the right choice, from 0, or its text"
        )
    return text_of(cell, rows, index, column).strip()


def _unclear(where: str, text: str, choices: tuple[str, ...], config: DataConfig) -> UserError:
    if len(_by_text(text, choices)) > 1:
        return UserError(f'{where}: the choice "{text}" occurs more than once; give the answer as an index from 0')
    listed = short(list(choices))
    if config.answers == "index":
        return UserError(
            f"{where} is {short(text)}, not a number from 0 to {len(choices) - 1} or the letter of a choice"
        )
    if not _by_text(text, choices):
        return UserError(f"{where} is {short(text)}, which is not among the choices {listed}")
    return UserError(
        f"{where} is {short(text)}, which is the text of one of the choices {listed} and the index of another; set "
        'data.answers = "text" or "index"'
    )


def _where(rows: Rows, index: int, column: str) -> str:
    return f'{rows.at(index)}: column "{column}"'

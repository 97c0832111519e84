"""Rows of a table from any source, and how an error message shows one cell."""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from hfedmoe.data.normal import normal
from hfedmoe.errors import UserError


@dataclass
class Rows:
    """Some columns of a table, and where each row came from.

    `names` lists every column of the table; `columns` holds the wanted ones, all of the same length. A missing cell is
    None. `lines` holds the 1-based line of each row, if the file has lines.
    """

    origin: str
    names: list[str]
    columns: dict[str, list[Any]]
    length: int
    lines: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def first(self, count: int | None) -> "Rows":
        """At most the first `count` rows; None: all."""
        if count is None or count >= self.length:
            return self
        columns = {name: cells[:count] for name, cells in self.columns.items()}
        return Rows(self.origin, self.names, columns, count, self.lines[:count])

    def at(self, index: int) -> str:
        """The name of one row for an error message."""
        return f"{self.origin} line {self.lines[index]}" if self.lines else f"{self.origin} row {index + 1}"

    def column(self, name: str, key: str) -> list[Any]:
        """The cells of one column; `key` is the setting that names it. Raises UserError if there is no such column."""
        if name not in self.columns:
            present = ", ".join(self.names) or "none"
            raise UserError(f'{self.origin}: no column "{name}"; columns present: {present}; set {key} to one of them')
        return self.columns[name]


def text_of(cell: Any, rows: Rows, index: int, column: str) -> str:
    """A cell that must be text, with its spaces. Raises UserError if it is missing, empty or not text."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        raise UserError(f'{rows.at(index)}: column "{column}" is missing; fill it in or remove the row')
    if not isinstance(cell, str):
        raise UserError(f'{rows.at(index)}: column "{column}" must be text, got {short(cell)}; write it as text')
    if not cell.strip():
        raise UserError(f'{rows.at(index)}: column "{column}" is empty; fill it in or remove the row')
    return cell


def short(value: Any) -> str:
    """A value for an error message, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def column_namer(wanted: Collection[str]) -> Callable[[str], str]:
    """A function from a column's name in a file to the wanted name that looks the same, else to its normal form."""
    same = {normal(name): name for name in wanted}
    known: dict[str, str] = {name: name for name in wanted}

    def name_of(written: str) -> str:
        if written not in known:
            plain = normal(written)
            known[written] = same.get(plain, plain)
        return known[written]

    return name_of


def half_character(cell: Any) -> bool:
    """Whether a text, or any text in a list or object, holds half of a surrogate pair, which is not valid Unicode."""
    try:
        json.dumps(cell, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def from_records(
    origin: str, records: list[dict[str, Any]], wanted: Collection[str], names: list[str], lines: list[int]
) -> Rows:
    """The wanted columns of records; `lines` holds the line of each record."""
    columns = {name: [record.get(name) for record in records] for name in names if name in wanted}
    return Rows(origin, names, columns, len(records), lines)

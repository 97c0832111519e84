"""The tables of a page: what a cell says and what it is sorted by. A column in which no row has a value is left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from hfedmoe.report.words import decimal, human_bytes, human_seconds, percent

NOTHING = "–"
Row = TypeVar("Row")


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str = NOTHING
    key: float | None = None
    """What it is sorted by; None: its text."""
    style: str = ""
    """Its CSS class."""

    @property
    def empty(self) -> bool:
        """Whether it has no value."""
        return self.text in (NOTHING, "")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A head, and what a row has under it."""

    head: str
    cell: Callable[[Row], Cell]


@dataclass(frozen=True)
class Table:
    """What is left of it."""

    heads: list[Cell]
    rows: list[list[Cell]]


def table(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> Table:
    """A table without the columns that have no value in any row."""
    filled = [[column.cell(row) for row in rows] for column in columns]
    kept = [number for number, cells in enumerate(filled) if not all(cell.empty for cell in cells)]
    return Table(
        [Cell(columns[number].head, style=_common(filled[number])) for number in kept],
        [[filled[number][row] for number in kept] for row in range(len(rows))],
    )


def _common(cells: Sequence[Cell]) -> str:
    """The style of a column's head: that of its cells, if they have the same."""
    styles = {cell.style for cell in cells}
    return styles.pop() if styles == {"text"} else ""


def words(text: str) -> Cell:
    """A text that may be long."""
    return Cell(text, style="text")


def count(value: int | None) -> Cell:
    """A number of things."""
    return Cell() if value is None else Cell(str(value), value)


def size(value: int | None) -> Cell:
    """Bytes."""
    return Cell() if value is None else Cell(human_bytes(value), value)


def duration(value: float | None) -> Cell:
    """Seconds."""
    return Cell() if value is None else Cell(human_seconds(value), value)


def share(value: float | None) -> Cell:
    """A share of 1, in per cent."""
    return Cell() if value is None else Cell(percent(value), value)


def number(value: float | None) -> Cell:
    """A loss or an F1."""
    return Cell() if value is None else Cell(decimal(value), value)

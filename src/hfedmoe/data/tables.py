"""Read tables from text files: CSV, TSV and Orange's TAB."""

import csv
import io
from collections.abc import Collection, Iterator
from typing import Any

from hfedmoe.data.decoding import Form, decode, looks_like
from hfedmoe.data.rows import Rows, column_namer, from_records
from hfedmoe.errors import UserError

ORANGE_TYPES = {"", "d", "discrete", "c", "continuous", "s", "string", "t", "time"}
LONGEST_CELL = 2**31 - 1  # csv stops at 131,072 characters unless told otherwise
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""Delimiters of a CSV, in the order in which the first line is searched for them."""


def read_csv(origin: str, raw: bytes, wanted: Collection[str], form: Form, delimiter: str | None = None) -> Rows:
    """Read a table; the first line that is not empty names the columns.

    Empty rows, empty cells after the last column, and empty columns without a name are skipped. So are the spaces after
    delimiters, if all names but the first have them: `text, label`.

    Args:
        delimiter: of this kind of file, unless `data.delimiter` is set; None: detected from the first line.

    Raises:
        UserError: it is no such table, a row does not fit the first line, or a column name occurs twice.
    """
    text = decode(origin, raw, form)
    begun, before, first = _header(text)
    if first.lower().startswith("sep=") and len(first) == 5:  # Excel writes such a line
        delimiter = form.delimiter or first[4]
        skipped = text.index(first, begun) + len(first)
        begun, more, first = _header(text[skipped:])
        begun, before = begun + skipped, before + more
    if first.lstrip()[:1] in ("{", "[") and (other := looks_like(text)):
        raise UserError(f"{origin}: {other}")
    if delimiter and not form.delimiter and delimiter not in first and (shown := _shown(first)) in first:
        raise UserError(
            f"{origin}: its first line has {DELIMITERS[shown]}, but no {DELIMITERS.get(delimiter, delimiter)}; name it "
            f".csv, or set {form.setting('delimiter', shown)}"
        )
    delimiter = form.delimiter or delimiter or _shown(first)
    name_of = column_namer(wanted)
    previous = csv.field_size_limit(LONGEST_CELL)
    # strict: an unclosed quote is an error; otherwise the rest of the file would become one cell
    source = io.StringIO(text[begun:], newline="")
    table = csv.reader(source, delimiter=delimiter, strict=True)
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        header = next(table, [])
        names = [name_of(_unquoted(cell)) for cell in header]
        while names and not names[-1]:  # commas after the last column
            names.pop()
        named = [name for name in names if name]
        if len(set(named)) < len(named):
            raise UserError(
                f"{origin} line {before + 1}: a column name occurs twice; the first line must name the columns"
            )
        if not named:
            raise UserError(
                f"{origin} line {before + 1}: the first line names no columns; write their names there, or remove it"
            )
        if _spaced(header, delimiter):  # else the quotes of a cell such as ` "a"` would be part of it
            before += table.line_num
            table = csv.reader(source, delimiter=delimiter, strict=True, skipinitialspace=True)
        for start, cells in _rows(table, before):
            records.append(_record(origin, start, cells, names, delimiter, form))
            lines.append(start)
    except csv.Error as error:
        raise UserError(f"{origin} line {before + table.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(previous)
    return from_records(origin, records, wanted, named, lines)


def read_tsv(origin: str, raw: bytes, wanted: Collection[str], form: Form) -> Rows:
    """Like `read_csv`, with tabs."""
    return read_csv(origin, raw, wanted, form, delimiter="\t")


def read_tab(origin: str, raw: bytes, wanted: Collection[str], form: Form) -> Rows:
    """Read a table of Orange: three lines with names, types and roles of the columns, sometimes an empty line, rows."""
    rows = read_tsv(origin, raw, wanted, form)
    header = 0
    if rows.columns and len(rows) >= 2 and {cells[0] for cells in rows.columns.values()} <= ORANGE_TYPES:
        header = 2
        while header < len(rows) and not any(cells[header] for cells in rows.columns.values()):
            header += 1
    columns = {name: cells[header:] for name, cells in rows.columns.items()}
    return Rows(origin, rows.names, columns, len(rows) - header, rows.lines[header:])


def _header(text: str) -> tuple[int, int, str]:
    """The first line that is not empty: its offset, the number of lines before it, and the line."""
    begun = 0
    for number, line in enumerate(io.StringIO(text, newline="")):
        if line.strip():
            return begun, number, line.strip("\r\n")
        begun += len(line)
    return begun, 0, ""


def _shown(first: str) -> str:
    """The delimiter of the first line: the first of `DELIMITERS` that it has, else a comma."""
    return next((delimiter for delimiter in DELIMITERS if delimiter in first), ",")


def _unquoted(cell: str) -> str:
    """A column's name without the spaces and quotes around it."""
    name = cell.strip()
    return name[1:-1].strip() if len(name) > 1 and name[0] == name[-1] == '"' else name


def _spaced(header: list[str], delimiter: str) -> bool:
    """Whether every name but the first has a space before it, as in `text, label`."""
    others = [cell for cell in header[1:] if cell.strip()]
    return delimiter != " " and bool(others) and all(cell.startswith(" ") for cell in others)


def _rows(table: Any, before: int) -> Iterator[tuple[int, list[str]]]:
    """For each row that is not empty, the line where it begins and its cells."""
    start = table.line_num + 1
    for cells in table:
        if any(cell.strip() for cell in cells):
            yield before + start, cells
        start = table.line_num + 1


def _record(origin: str, line: int, cells: list[str], names: list[str], delimiter: str, form: Form) -> dict[str, Any]:
    while len(cells) > len(names) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) != len(names):
        hint = f'put cells that hold "{delimiter}" in double quotes'
        if len(names) == 1:
            hint += f", or set {form.setting('delimiter')}"
        raise UserError(
            f"{origin} line {line}: {len(cells)} cells, but the first line names {len(names)} columns; {hint}"
        )
    unnamed = next((cell for name, cell in zip(names, cells, strict=True) if not name and cell.strip()), None)
    if unnamed is not None:
        raise UserError(f"{origin} line {line}: a cell is in a column without a name; name it in the first line")
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}

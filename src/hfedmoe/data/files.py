"""Read one local table (CSV, TSV, Orange's TAB, JSONL, JSON, Parquet), with errors that name the file and the line."""

import csv
import io
import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfedmoe.errors import UserError

ORANGE_TYPES = {"", "d", "discrete", "c", "continuous", "s", "string", "t", "time"}
LONGEST_CELL = 2**31 - 1  # csv stops at 131,072 characters unless told otherwise


@dataclass
class Rows:
    """Some columns of a table, and where each row came from.

    `names` lists every column of the table, `columns` holds the wanted ones (all of the same length); a cell that is
    missing is None. `lines` holds the 1-based line of each row where the file has lines.
    """

    origin: str
    names: list[str]
    columns: dict[str, list[Any]]
    length: int
    lines: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def first(self, count: int | None) -> "Rows":
        """At most the first so many rows; None: all."""
        if count is None or count >= self.length:
            return self
        columns = {name: cells[:count] for name, cells in self.columns.items()}
        return Rows(self.origin, self.names, columns, count, self.lines[:count])

    def at(self, index: int) -> str:
        """Name one row for an error message."""
        return f"{self.origin} line {self.lines[index]}" if self.lines else f"{self.origin} row {index + 1}"

    def column(self, name: str, key: str) -> list[Any]:
        """The cells of one column; `key` is the setting that names it. Raises UserError if there is no such column."""
        if name not in self.columns:
            present = ", ".join(self.names) or "none"
            raise UserError(f'{self.origin}: no column "{name}"; columns present: {present}; set {key} to one of them')
        return self.columns[name]


def text_of(cell: Any, rows: Rows, index: int, column: str) -> str:
    """A cell that must be text, with its spaces. Raises UserError if it is missing, empty or something else."""
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


def read_file(path: Path, wanted: Collection[str]) -> Rows:
    """Read the wanted columns of one file; the suffix names the format.

    Raises:
        UserError: the file is missing, empty, of an unknown format, not UTF-8 or not well-formed.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f'{path}: unknown format "{path.suffix}"; use one of {", ".join(READERS)}')
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise UserError(f"{path}: the file is empty")
    rows = reader(str(path), raw, wanted)
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def _decode(origin: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{origin} line {line}: not UTF-8; save the file with UTF-8 encoding") from None


def _read_csv(origin: str, raw: bytes, wanted: Collection[str], delimiter: str = ",") -> Rows:
    text = _decode(origin, raw)
    previous = csv.field_size_limit(LONGEST_CELL)
    # strict: an unclosed quote is an error instead of swallowing the rest of the file
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        names = [name.strip() for name in next(table, [])]
        if len(set(names)) < len(names):
            raise UserError(f"{origin} line 1: a column name occurs twice; the first line must name the columns")
        start = table.line_num + 1
        for cells in table:
            if cells and len(cells) != len(names):
                raise UserError(
                    f"{origin} line {start}: {len(cells)} cells, but the first line names {len(names)} columns; "
                    f'put cells that hold "{delimiter}" in double quotes'
                )
            if cells:
                records.append(dict(zip(names, cells, strict=True)))
                lines.append(start)
            start = table.line_num + 1
    except csv.Error as error:
        raise UserError(f"{origin} line {table.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(previous)
    return _from_records(origin, records, wanted, names, lines)


def _read_tsv(origin: str, raw: bytes, wanted: Collection[str]) -> Rows:
    return _read_csv(origin, raw, wanted, delimiter="\t")


def _read_tab(origin: str, raw: bytes, wanted: Collection[str]) -> Rows:
    """A table as Orange writes it: names, types and roles of the columns in three lines, then perhaps an empty one."""
    rows = _read_csv(origin, raw, wanted, delimiter="\t")
    header = 0
    if rows.columns and len(rows) >= 2 and {cells[0] for cells in rows.columns.values()} <= ORANGE_TYPES:
        header = 2
        while header < len(rows) and not any(cells[header] for cells in rows.columns.values()):
            header += 1
    columns = {name: cells[header:] for name, cells in rows.columns.items()}
    return Rows(origin, rows.names, columns, len(rows) - header, rows.lines[header:])


def _read_jsonl(origin: str, raw: bytes, wanted: Collection[str]) -> Rows:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_decode(origin, raw).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _parse_json(line, f"{origin} line {number}")
        except json.JSONDecodeError as error:
            raise UserError(f"{origin} line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(record, dict):
            raise UserError(f'{origin} line {number}: expected an object such as {{"text": ...}} on every line')
        _check_unicode(line, record, f"{origin} line {number}", wanted)
        records.append(record)
        lines.append(number)
    return _from_records(origin, records, wanted, _names(records), lines)


def _read_json(origin: str, raw: bytes, wanted: Collection[str]) -> Rows:
    text = _decode(origin, raw)
    try:
        records = _parse_json(text, origin)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}); "
            "if every line is an object of its own, name the file .jsonl"
        ) from None
    if not isinstance(records, list):
        raise UserError(f"{origin}: expected a list of objects; if it has one object a line, name the file .jsonl")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f'{origin} row {index + 1}: expected an object such as {{"text": ...}}')
        _check_unicode(text, record, f"{origin} row {index + 1}", wanted)
    return _from_records(origin, records, wanted, _names(records), [])


def _parse_json(text: str, where: str) -> Any:
    """JSON without the two things that Python lets pass or fails on: a key that occurs twice, and bottomless nesting.

    Raises:
        UserError: one of them. JSONDecodeError: not JSON.
    """

    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f'{where}: the key "{twice}" occurs twice in one object; keep one of them')
        return made

    try:
        return json.loads(text, object_pairs_hook=record)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a row of data; check the file") from None


def _check_unicode(text: str, record: dict[str, Any], where: str, wanted: Collection[str]) -> None:
    """Raise UserError for a cell with half of a surrogate pair, which JSON can write and no tokenizer can read."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    for name in record.keys() & wanted:
        if half_character(record[name]):
            raise UserError(
                f'{where}: column "{name}" holds half a character (such as \\ud83d without the half behind it), '
                "probably of a text that was cut; repair or remove the row"
            )


def half_character(cell: Any) -> bool:
    """Whether a text, or any in a list or object, holds half of a surrogate pair, which is no Unicode."""
    try:
        json.dumps(cell, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(origin: str, raw: bytes, wanted: Collection[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        names = list(file.schema_arrow.names)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f'{origin}: the column "{twice}" occurs twice; keep one of them')
        columns = file.read(columns=[name for name in names if name in wanted]).to_pydict()
    except UnicodeDecodeError:
        raise UserError(f"{origin}: a text column holds bytes that are not UTF-8; write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{origin}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    return Rows(origin, names, columns, file.metadata.num_rows)


def _names(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _from_records(
    origin: str, records: list[dict[str, Any]], wanted: Collection[str], names: list[str], lines: list[int]
) -> Rows:
    columns = {name: [record.get(name) for record in records] for name in names if name in wanted}
    return Rows(origin, names, columns, len(records), lines)


READERS: dict[str, Callable[[str, bytes, Collection[str]], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".tab": _read_tab,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}

"""Read one local table (CSV, TSV, Orange's TAB, JSONL, JSON, Parquet), with errors that name the file and the line."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hfedmoe.data.decoding import PARQUET, PLAIN, Form, decode, looks_like, unpacked
from hfedmoe.data.rows import Rows, column_namer, from_records, half_character
from hfedmoe.data.tables import read_csv, read_tab, read_tsv
from hfedmoe.errors import UserError


def read_file(path: Path, wanted: Collection[str], form: Form = PLAIN) -> Rows:
    """Read the wanted columns of one file; the suffix names the format (a final `.gz` is unpacked).

    Raises:
        UserError: the file is missing, empty, of an unknown format, in another encoding or not well-formed.
    """
    name = Path(path.stem) if path.suffix.lower() == ".gz" else path
    reader = READERS.get(name.suffix.lower())
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise UserError(f"{path}: the file is empty")
    raw = unpacked(str(path), raw)
    if raw.startswith(PARQUET):
        reader = _read_parquet  # with any suffix: no other format begins like that
    if reader is None:
        gz = ".gz" if name != path else ""
        shown = f'"{name.suffix}"' if name.suffix else f"(no suffix{' before .gz' if gz else ''})"
        raise UserError(f"{path}: unknown format {shown}; use one of {', '.join(known + gz for known in READERS)}")
    rows = reader(str(path), raw, wanted, form)
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def _read_jsonl(origin: str, raw: bytes, wanted: Collection[str], form: Form) -> Rows:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    name_of = column_namer(wanted)
    text = decode(origin, raw, form)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _parse_json(line, f"{origin} line {number}")
        except json.JSONDecodeError as error:
            if not records and (other := looks_like(text)):
                raise UserError(f"{origin}: {other}") from None
            raise UserError(f"{origin} line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(record, dict):
            hint = "; name a file that is one list .json" if isinstance(record, list) and not records else ""
            raise UserError(f'{origin} line {number}: expected an object such as {{"text": ...}} on every line{hint}')
        record = _named(record, name_of, f"{origin} line {number}")
        _check_unicode(line, record, f"{origin} line {number}", wanted)
        records.append(record)
        lines.append(number)
    return from_records(origin, records, wanted, _names(records), lines)


def _read_json(origin: str, raw: bytes, wanted: Collection[str], form: Form) -> Rows:
    text = decode(origin, raw, form)
    try:
        records = _parse_json(text, origin)
    except json.JSONDecodeError as error:
        if other := looks_like(text):
            raise UserError(f"{origin}: {other}") from None
        raise UserError(
            f"{origin} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}); "
            "if every line is an object of its own, name the file .jsonl"
        ) from None
    if not isinstance(records, list):
        raise UserError(f"{origin}: expected a list of objects; if it has one object a line, name the file .jsonl")
    name_of = column_namer(wanted)
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f'{origin} row {index + 1}: expected an object such as {{"text": ...}}')
        records[index] = _named(record, name_of, f"{origin} row {index + 1}")
        _check_unicode(text, records[index], f"{origin} row {index + 1}", wanted)
    return from_records(origin, records, wanted, _names(records), [])


def _parse_json(text: str, where: str) -> Any:
    """Parse JSON.

    Raises:
        UserError: a key occurs twice in one object (Python would keep the last), or the nesting is too deep.
        JSONDecodeError: not JSON.
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


def _named(record: dict[str, Any], name_of: Callable[[str], str], where: str) -> dict[str, Any]:
    """A record with the names of columns as keys. Raises UserError if two of its keys look the same."""
    named = {name_of(key): value for key, value in record.items()}
    if len(named) < len(record):
        keys = list(map(name_of, record))
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f'{where}: two keys look like "{twice}"; keep one of them')
    return named


def _check_unicode(text: str, record: dict[str, Any], where: str, wanted: Collection[str]) -> None:
    """Raise UserError for a cell with half of a surrogate pair: JSON can hold it, but no tokenizer can read it."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    for name in record.keys() & wanted:
        if half_character(record[name]):
            raise UserError(
                f'{where}: column "{name}" holds half a character (such as \\ud83d without its second half), '
                "probably because a text was cut; repair or remove the row"
            )


def _read_parquet(origin: str, raw: bytes, wanted: Collection[str], form: Form) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        written = list(file.schema_arrow.names)
        names = list(map(column_namer(wanted), written))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f'{origin}: the column "{twice}" occurs twice; keep one of them')
        own = {name: key for name, key in zip(names, written, strict=True) if name in wanted}
        table = file.read(columns=list(own.values())).to_pydict()
        columns = {name: table[key] for name, key in own.items()}
    except UnicodeDecodeError:
        raise UserError(f"{origin}: a text column holds bytes that are not UTF-8; write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{origin}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    return Rows(origin, names, columns, file.metadata.num_rows)


def _names(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


READERS: dict[str, Callable[[str, bytes, Collection[str], Form], Rows]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".tab": read_tab,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}

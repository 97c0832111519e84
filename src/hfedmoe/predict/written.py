"""Write rows with their predictions, in the format that the file's name says."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing

OTHER = "choose another --out"
Columns = dict[str, list[Any]]


def output_for(file: Path, out: Path | None) -> Path:
    """Where predictions for the rows of `file` go: `out`, or `NAME.predicted.SUFFIX` beside it.

    Raises:
        UserError: the format of `out` is unknown, it exists, or its folder does not.
    """
    if out is None:
        name = Path(file.stem) if file.suffix.lower() == ".gz" else Path(file.name)
        out = file.with_name(f"{name.stem}.predicted{name.suffix if name.suffix.lower() in WRITERS else '.csv'}")
    if out.suffix.lower() not in WRITERS:
        raise UserError(f"--out {out}: unknown format; use one of {', '.join(WRITERS)}")
    if out.exists():
        raise UserError(f"{out}: exists already; {OTHER}, or move it away")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or {OTHER}")
    return out


def write(out: Path, columns: Columns) -> None:
    """Write columns of equal length, whole or not at all.

    Raises:
        UserError: the disk is full or not writable, or Parquet cannot hold a column of several types.
    """
    content = WRITERS[out.suffix.lower()](out, columns)
    with disk_errors(out, OTHER), replacing(out) as file:
        file.write(content)


def _csv(_: Path, columns: Columns) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        table.writerow([_cell(value) for value in row])
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _jsonl(_: Path, columns: Columns) -> bytes:
    lines = (
        json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, default=str)
        for row in zip(*columns.values(), strict=True)
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _parquet(out: Path, columns: Columns) -> bytes:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.table(columns)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{out}: a column has cells of several types ({reason}); choose --out with .jsonl") from None
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[Path, Columns], bytes]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}

"""metrics.jsonl: one line of valid JSON per round.

A line is valid when its line break is written. A process that is killed before that leaves an incomplete last line,
which is never read, and which the next write removes.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hfedmoe.files.disk import replacing, sync

logger = logging.getLogger(__name__)

BLOCK = 1 << 16


def append(path: Path, record: dict[str, Any], clients: Iterable[dict[str, Any]] | None = None) -> None:
    """Add a line; NaN and infinity, which JSON does not have, become null.

    Args:
        clients: the last entry, "clients", written one by one, so that they need not fit into memory.
    """
    whole = _end_of_last_line(path)
    try:
        with path.open("ab") as file:
            file.truncate(whole)
            if clients is None:
                file.write(_line(record))
            else:
                file.write(_line(record)[: -len(b"}\n")] + b', "clients": [')
                for number, client in enumerate(clients):
                    file.write((b", " if number else b"") + _line(client)[:-1])
                file.write(b"]}\n")
            sync(file)
    except OSError:
        if path.exists():
            os.truncate(path, whole)
        raise


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines, in order; a line that is not JSON is left out with a warning."""
    return list(iterate(path))


def iterate(path: Path) -> Iterator[dict[str, Any]]:
    """Like `read`, one line at a time."""
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        else:
            logger.warning("%s: line %d is damaged and left out", path, number)


def drop_after(path: Path, round: int) -> None:
    """Keep only the lines up to a round. Every record must have its number under "round"."""
    records = read(path)
    kept = [record for record in records if record["round"] <= round]
    if len(kept) < len(records) or (path.exists() and _end_of_last_line(path) < path.stat().st_size):
        with replacing(path) as file:
            file.write(b"".join(_line(record) for record in kept))


def amend(path: Path, round: int, more: dict[str, Any]) -> None:
    """Add entries to the last line of a round; the file is replaced as a whole. Nothing happens without such a line."""
    lines = list(_whole_lines(path))
    for number in reversed(range(len(lines))):
        record = json.loads(lines[number])
        if record["round"] == round:
            lines[number] = _line(record | more)[:-1]
            with replacing(path) as file:
                file.writelines(line + b"\n" for line in lines)
            return


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(_finite(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _whole_lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]


def _end_of_last_line(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        while at > 0:  # from the end: the file grows with the run, and every round searches it
            begin = max(0, at - BLOCK)
            file.seek(begin)
            found = file.read(at - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            at = begin
    return 0

"""metrics.jsonl: one line of valid JSON per round, added in one go.

A process killed while it writes leaves a last line without its end. Such a line is never read, and the next
write cuts it off.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from hfedmoe.runs.disk import replacing, sync

logger = logging.getLogger(__name__)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line; NaN and infinity, which JSON does not know, become null."""
    whole = _end_of_last_line(path)
    try:
        with path.open("ab") as file:
            file.truncate(whole)
            file.write(_line(record))
            sync(file)
    except OSError:
        if path.exists():
            os.truncate(path, whole)
        raise


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order; a line that is not JSON is left out with a warning."""
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            logger.warning("%s: line %d is damaged and left out", path, number)
    return records


def drop_after(path: Path, round: int) -> None:
    """Keep only the lines up to a round. Every record must have its number under "round"."""
    records = read(path)
    kept = [record for record in records if record["round"] <= round]
    if len(kept) < len(records) or (path.exists() and _end_of_last_line(path) < path.stat().st_size):
        with replacing(path) as file:
            file.write(b"".join(_line(record) for record in kept))


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


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _end_of_last_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0

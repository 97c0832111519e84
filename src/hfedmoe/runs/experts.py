"""experts.npy: usage, importance and state of the experts, one row per round and participating client.

| field | type | content |
|---|---|---|
| round, client | int64 | rounds in order |
| usage, importance | float32 [L, E] | E = max over layers; NaN where a layer has fewer experts |
| resident, trained | bool [L, E] | False where a layer has fewer experts |

It is a structured numpy array (`numpy.load(path, mmap_mode="r")["usage"]` is [rows, L, E]) to which rows are appended.
So the cost of a round depends only on its participating clients, and no client's vectors stay in memory until the end
of the round. Rows are valid only when the header counts them.
"""

import io
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing, sync

FIELDS = {"usage": np.float32, "importance": np.float32, "resident": np.bool_, "trained": np.bool_}


class RoundRows:
    """Writes the rows of one round: `add` every client, then `commit`; rows before the commit are never read.

    Args:
        path: of experts.npy.
        num_experts: E_l of every layer.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, round: int, num_experts: Sequence[int]) -> None:
        self._round = round
        shape = (len(num_experts), max(num_experts))
        self._dtype = np.dtype(
            [("round", np.int64), ("client", np.int64), *((name, kind, shape) for name, kind in FIELDS.items())]
        )
        self._exists = np.arange(shape[1]) < np.asarray(num_experts)[:, None]  # [L, E]
        before = rows(path)
        if before is None:
            with replacing(path) as file:  # a kill must not leave a file without its header
                file.write(_header(self._dtype, 0))
        self._rows = self._kept = 0 if before is None else _earlier(before, round)
        self._file = path.open("r+b")
        _cut(self._file, self._dtype, self._kept)
        self._file.seek(0, io.SEEK_END)

    def add(self, client: int, usage: Any, importance: Any, resident: Any, trained: Any) -> None:
        """Write one client's vectors [sum E_l], layer after layer, float or bool."""
        row = np.zeros(1, self._dtype)
        row["round"], row["client"] = self._round, client
        for name, vector in zip(FIELDS, (usage, importance, resident, trained), strict=True):
            if FIELDS[name] is np.float32:
                row[name] = np.nan
            row[name][0][self._exists] = np.asarray(vector, FIELDS[name])
        try:
            self._file.write(row.tobytes())
        except OSError:
            self.drop()
            raise
        self._rows += 1

    def commit(self) -> None:
        """Make the rows valid."""
        try:
            sync(self._file)  # the rows must be on the disk before the header counts them
            self._file.seek(0)
            self._file.write(_header(self._dtype, self._rows))
            sync(self._file)
        except OSError:
            self.drop()
            raise
        self._file.close()

    def drop(self) -> None:
        """Remove the rows, also if `commit` failed after it wrote the header."""
        if self._file.closed:
            return
        self._rows = self._kept
        # If the disk is full, a new file object is needed: this one still has a buffer that cannot be written.
        path = Path(self._file.name)
        try:
            self._file.close()
        finally:
            with path.open("r+b") as file:
                _cut(file, self._dtype, self._kept)


def drop_after(path: Path, round: int) -> None:
    """Keep only the rows up to a round; before round 1 there are none, so the file is deleted, even if damaged.

    Raises:
        UserError: the file is damaged.
    """
    if round < 1:
        path.unlink(missing_ok=True)
        return
    table = rows(path)
    if table is None:
        return
    kept, dtype = _earlier(table, round + 1), table.dtype
    if kept < len(table):
        with path.open("r+b") as file:
            _cut(file, dtype, kept)
            sync(file)


def rows(path: Path) -> np.ndarray | None:
    """All rows, memory-mapped; None: there is no file yet. Raises UserError if it is damaged."""
    try:
        return _map(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); make it readable") from None
    except ValueError as error:
        raise UserError(
            f"{path}: damaged ({error}); restore it, or delete it and resume the run: its rows are needed only for "
            'method.bootstrap = "prior" and for `hfedmoe export --as client`'
        ) from None


def of_round(table: np.ndarray, round: int) -> np.ndarray:
    """The rows of one round."""
    return table[_earlier(table, round) : _earlier(table, round + 1)]


def _earlier(table: np.ndarray, round: int) -> int:
    """Number of rows of earlier rounds, by binary search: rounds are in order, so few rows are read."""
    return bisect_left(table, round, key=lambda row: row["round"])


def _cut(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    """Keep only the first `count` rows. The header is written first, so it never counts rows that do not exist."""
    header = _header(dtype, count)
    file.seek(0)
    file.write(header)
    file.truncate(len(header) + count * dtype.itemsize)


def _map(path: Path) -> np.ndarray:
    """Like `rows`, but raises OSError, or ValueError if the file is damaged."""
    with path.open("rb") as file:
        dtype, count, begin = _read_header(file)
    if begin + count * dtype.itemsize > path.stat().st_size:
        raise ValueError("it is shorter than its header says")
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=begin, shape=(count,))


def _read_header(file: BinaryIO) -> tuple[np.dtype, int, int]:
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except OSError:
        raise
    except Exception as error:  # numpy reads a header with Python's parser, which can raise many errors
        raise ValueError(str(error)) from None
    if len(shape) != 1 or shape[0] < 0 or dtype.names != ("round", "client", *FIELDS):
        raise ValueError("its header is that of another table")
    return dtype, shape[0], file.tell()


def _header(dtype: np.dtype, count: int) -> bytes:
    """The header of a .npy file; its length is the same for any count, because numpy pads it."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()

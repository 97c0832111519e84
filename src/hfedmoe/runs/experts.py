"""experts.npy: what the experts did, one row per round and client that took part, for plots and reports.

| field | type | content |
|---|---|---|
| round, client | int64 | rounds in order |
| usage, importance | float32 [L, E] | E = max over layers; NaN where a layer has fewer experts |
| resident, trained | bool [L, E] | False there |

It is an ordinary structured numpy array (`numpy.load(path, mmap_mode="r")["usage"]` is [rows, L, E]), to which rows are
added as they come. So a round costs what its clients are, whatever the number of rounds and of registered clients, and
no client's vectors wait in memory for the end of the round. Rows count from the moment in which the header says so.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hfedmoe.errors import UserError
from hfedmoe.runs.disk import sync, sync_folder

FIELDS = {"usage": np.float32, "importance": np.float32, "resident": np.bool_, "trained": np.bool_}


@dataclass(frozen=True)
class ExpertHistory:
    """All rows as dense arrays: rounds int64 [N], clients int64 [C], num_experts int64 [L], the fields [N, C, L, E].

    Where a client took no part in a round there is NaN or False.
    """

    rounds: np.ndarray
    clients: np.ndarray
    num_experts: np.ndarray
    usage: np.ndarray
    importance: np.ndarray
    resident: np.ndarray
    trained: np.ndarray


class RoundRows:
    """The rows of one round: `add` every client, then `commit`; what was not committed is not read by anybody.

    Args:
        path: of experts.npy.
        num_experts: E_l of every layer.
    """

    def __init__(self, path: Path, round: int, num_experts: Sequence[int]) -> None:
        self._round = round
        shape = (len(num_experts), max(num_experts))
        self._dtype = np.dtype(
            [("round", np.int64), ("client", np.int64), *((name, kind, shape) for name, kind in FIELDS.items())]
        )
        self._exists = np.arange(shape[1]) < np.asarray(num_experts)[:, None]  # [L, E]
        fresh = not path.exists()
        before = rows(path)
        kept = 0 if before is None else int((before["round"] < round).sum())
        self._file = path.open("w+b" if fresh else "r+b")
        if fresh:
            self._file.write(_header(self._dtype, 0))
            sync_folder(path.parent)
        self._rows = self._kept = kept
        self._truncate()

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
        """Make the rows count."""
        try:
            sync(self._file)  # the rows are on the disk before the header speaks of them
            self._file.seek(0)
            self._file.write(_header(self._dtype, self._rows))
            sync(self._file)
        except OSError:
            self.drop()
            raise
        self._file.close()

    def drop(self) -> None:
        """Forget the rows."""
        if self._file.closed:
            return
        self._rows = self._kept
        # A buffer that a full disk does not take is thrown away with its file object.
        path = Path(self._file.name)
        try:
            self._file.close()
        finally:
            with path.open("r+b") as file:
                file.truncate(len(_header(self._dtype, 0)) + self._kept * self._dtype.itemsize)

    def _truncate(self) -> None:
        header = _header(self._dtype, self._kept)
        self._file.seek(0)
        self._file.write(header)
        self._file.truncate(len(header) + self._kept * self._dtype.itemsize)
        self._file.seek(0, io.SEEK_END)


def drop_after(path: Path, round: int) -> None:
    """Keep only the rows up to a round."""
    if path.exists():
        rows = _map(path)
        kept = int((rows["round"] <= round).sum())
        if kept < len(rows):
            with path.open("r+b") as file:
                header = _header(rows.dtype, kept)
                file.write(header)
                file.truncate(len(header) + kept * rows.dtype.itemsize)
                sync(file)


def rows(path: Path) -> np.ndarray | None:
    """All rows, mapped from the file; None if there is none yet. Raises UserError if it is damaged."""
    try:
        return _map(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, the run does not need it to go on") from None


def read(path: Path) -> ExpertHistory | None:
    """All rows as dense arrays; None if there are none yet. Raises UserError if the file is damaged."""
    table = rows(path)
    if table is None:
        return None
    rounds, at_round = np.unique(table["round"], return_inverse=True)
    clients, at_client = np.unique(table["client"], return_inverse=True)
    shape = table.dtype["usage"].shape
    arrays = {}
    for name, kind in FIELDS.items():
        nothing = np.nan if kind is np.float32 else False
        arrays[name] = np.full((len(rounds), len(clients), *shape), nothing, kind)
        arrays[name][at_round, at_client] = table[name]
    num_experts = (~np.isnan(table["usage"][0])).sum(1) if len(table) else np.full(shape[0], shape[1])
    return ExpertHistory(rounds, clients, num_experts.astype(np.int64), **arrays)


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        dtype, count, begin = _read_header(file)
    if begin + count * dtype.itemsize > path.stat().st_size:
        raise ValueError("it is shorter than its header says")
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=begin, shape=(count,))


def _read_header(file: BinaryIO) -> tuple[np.dtype, int, int]:
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, shape[0], file.tell()


def _header(dtype: np.dtype, count: int) -> bytes:
    """Of a .npy file; as long for any count, because numpy leaves room for it to grow."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()

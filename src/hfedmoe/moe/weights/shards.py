"""Read single tensors, or single rows of them, from a safetensors checkpoint of one or many files.

Files are read, not mapped: used pages of a mapped file count as memory of the process, which a device with a budget
must avoid. A tensor is read directly into its final memory.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfedmoe.files.lfs import pointer_in

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes: the limit of the format for the header of a file."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """The checkpoint is missing, damaged, or does not fit its model; the message names the file or tensor."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is: bytes [start, end) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start


@dataclass(frozen=True)
class HeaderEntry:
    """Where a tensor is: bytes [start, end) of a file; `stored_as` is the format's name of its precision."""

    file: Path
    stored_as: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its precision; None: it cannot be read yet."""
        return _DTYPES.get(self.stored_as)


class Shards:
    """The tensors of a checkpoint folder by name; none is read before it is asked for.

    Raises:
        CheckpointError: there is no safetensors checkpoint in the folder, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        file = weights_file(folder)
        if file is None:
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}")
        for part in files_of(file):
            self.entries |= dict(_entries(part))

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {name}") from None

    def read(self, name: str) -> Tensor:
        """A tensor in its stored precision, in its own memory."""
        entry = self[name]
        return _read(entry, entry.start, entry.shape)

    def read_row(self, name: str, row: int) -> Tensor:
        """`tensor[row]` of a tensor with at least two dimensions; only these bytes are read."""
        entry = self[name]
        if len(entry.shape) < 2 or not 0 <= row < entry.shape[0]:
            raise CheckpointError(f"{entry.file.name}: {name} of shape {list(entry.shape)} has no row {row}")
        size = entry.nbytes // entry.shape[0]
        return _read(entry, entry.start + row * size, entry.shape[1:])


def weights_file(folder: Path) -> Path | None:
    """The file or index of a folder's safetensors checkpoint that transformers loads; None if it has neither.

    As `transformers.modeling_utils._get_resolved_checkpoint_files`: `transformers_weights` in config.json, else the
    single file, else the index. A folder that was saved first in shards and then as one file has both.
    """
    try:
        explicit = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):  # code that needs the config reports the error
        explicit = None
    if isinstance(explicit, str):
        file = folder / explicit
        return file if file.resolve().is_relative_to(folder.resolve()) else None
    return next((folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)


def files_of(file: Path) -> list[Path]:
    """The files that an index names (which may not exist), or the file itself if it is no index.

    Raises:
        CheckpointError: the index is damaged, or names files outside its folder.
    """
    if not file.name.endswith(".index.json"):
        return [file]
    folder = file.parent
    try:
        places = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(part) for part in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not an index of a sharded checkpoint ({error})") from None
    if not all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names):
        raise CheckpointError(f"{file}: names files outside its folder")
    return [folder / name for name in names]


def check_precisions(folder: Path) -> None:
    """Raise CheckpointError if a tensor of a folder's checkpoint has a precision that cannot be read.

    Only files that are there are looked at: a device can be planned for before they are downloaded.
    """
    file = weights_file(folder)
    for part in [] if file is None else files_of(file):
        if part.is_file() and pointer_in(part) is None:
            for _ in _entries(part):
                pass


def _entries(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    for name, place in places_in(file):
        if place.dtype is None:
            raise CheckpointError(
                f"{file}: {name} is stored as {place.stored_as}, which cannot be read without a quantization_config in "
                "config.json; download the checkpoint again, or use one in 16 or 32 bit"
            )
        if place.end - place.start != prod(place.shape) * place.dtype.itemsize:
            raise CheckpointError(f"{file}: {name} does not lie within the file; it is damaged or cut off")
        yield name, TensorEntry(file, place.dtype, place.shape, place.start, place.end)


def places_in(file: Path) -> Iterator[tuple[str, HeaderEntry]]:
    """Names and places of the tensors of one file, in any precision, checked against its size.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        if (pointer := pointer_in(file)) is not None:
            raise CheckpointError(pointer)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file, or cut off")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, described in header.items():
            start, end = (8 + length + int(offset) for offset in described["data_offsets"])
            shape = tuple(int(number) for number in described["shape"])
            if not 8 + length <= start <= end <= size:
                raise CheckpointError(f"{file}: {name} does not lie within the file; it is damaged or cut off")
            yield name, HeaderEntry(file, str(described["dtype"]), shape, start, end)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, though the checkpoint's index names it") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None


def _read(entry: TensorEntry, start: int, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=entry.dtype)
    if tensor.numel() == 0:
        return tensor
    try:
        _fill(tensor, entry, start)
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read ({error.strerror or error})") from None
    return tensor


def _fill(tensor: Tensor, entry: TensorEntry, start: int) -> None:
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{entry.file}: ends in the middle of a tensor; it is damaged or cut off")
            done += count

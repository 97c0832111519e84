"""Write and read named tensors as safetensors, with as few copies as possible: tensors are views of the bytes.

The bytes equal those of safetensors' own `save`, which copies every tensor once more for writing and for reading. An
update or checkpoint is as large as all trained tensors together.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' name -> torch's."""
MAX_HEADER = 1 << 26
"""Default maximum size of a header in bytes; enough for some hundred thousand tensors."""
MAX_DIMENSIONS = 8
"""No trained tensor has more; this limit keeps the product of a header's numbers small."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor [n, ...], which are copied only when they are written."""

    tensor: "Tensor"
    index: "Tensor"
    """int64 [m], of the rows."""

    @property
    def dtype(self) -> "torch.dtype":
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.tensor.shape[1:])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.tensor.dtype.itemsize


def chunks(tensors: Mapping[str, "Tensor | Rows"]) -> list[Any]:
    """The blob in pieces (byte buffers): the header, then each tensor or row, without a copy if possible.

    Raises:
        ValueError: safetensors cannot store a tensor's dtype.
    """
    import torch

    names = {getattr(torch, name): code for code, name in DTYPES.items()}
    header: dict[str, Any] = {}
    pieces: list[Any] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # large items first: aligned
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise ValueError(f"{name}: safetensors cannot store {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        pieces += [_buffer(tensor)] if isinstance(tensor, torch.Tensor) else _row_buffers(tensor)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def _buffer(tensor: "Tensor") -> Any:
    """The bytes of a tensor; a copy only if it is elsewhere or not in one piece."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _row_buffers(rows: Rows) -> list[Any]:
    """The bytes of rows, one after the other, as views where that is possible."""
    if rows.tensor.device.type != "cpu" or not rows.tensor.is_contiguous():
        return [_buffer(rows.tensor[rows.index])]
    flat = _buffer(rows.tensor).reshape(len(rows.tensor), -1)
    return [flat[row] for row in rows.index.tolist()]


def dumps(tensors: Mapping[str, "Tensor | Rows"]) -> bytes:
    """The whole blob; every tensor is copied once. Raises ValueError like `chunks`."""
    return b"".join(chunks(tensors))


def loads(data: bytes, max_header: int = MAX_HEADER) -> dict[str, "Tensor"]:
    """The tensors of a blob as views of it: they keep `data` alive, and must not be written to.

    The header is checked: lengths, offsets, shapes and alignment must be consistent.

    Args:
        max_header: maximum size of the header in bytes; parsed JSON may take more than twenty times as much memory.

    Raises:
        ValueError: not a valid safetensors blob.
    """
    import torch

    size = int.from_bytes(data[:8], "little")
    start = 8 + size
    if len(data) < 8 or start > len(data):
        raise ValueError("its header is longer than the data")
    if size > max_header:
        raise ValueError(f"its header has {size} bytes; at most {max_header} are allowed")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda place: place[1][2:]):
        if begin != at:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        at = end
    if start + at != len(data):
        raise ValueError("its length is not that of its header and tensors")
    if start % 8:
        raise ValueError("its header does not end at a multiple of 8 bytes")
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this memory is read-only
        for name, (kind, shape, begin, end) in places.items():
            dtype = getattr(torch, kind)
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
            elif begin % dtype.itemsize:
                raise ValueError(f"{name[:80]} does not begin at a multiple of {dtype.itemsize} bytes")
            else:
                count = (end - begin) // dtype.itemsize
                tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).reshape(shape)
    return tensors


def _place(name: str, entry: Any) -> tuple[str, list[int], int, int]:
    """dtype, shape, begin and end of one tensor. Raises ValueError."""
    import torch

    try:
        kind, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        few = len(shape) <= MAX_DIMENSIONS
        whole = few and all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name[:80]} is not described as a tensor") from None
    if not few:
        raise ValueError(f"{name[:80]} has more than {MAX_DIMENSIONS} dimensions")
    if not whole or math.prod(shape) * getattr(torch, kind).itemsize != end - begin:
        raise ValueError(f"{name[:80]} does not have the size of its shape")
    return kind, list(shape), begin, end

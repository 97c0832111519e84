"""Named tensors as safetensors, written from and read as views of memory: no copy but the one that has to be.

The bytes are those of safetensors' own `save`. It copies every tensor once to write it and once more to read it; an
update or a checkpoint is as large as everything that is trained.
"""

import json
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
"""Bytes, unless the caller knows better: some hundred thousand tensors."""
MAX_DIMENSIONS = 8
"""Nothing that is trained has more; the product of a header's numbers stays small."""


def chunks(tensors: Mapping[str, "Tensor"]) -> list[Any]:
    """The blob in pieces (buffers of bytes): the header, then each tensor's own memory, wherever that is possible.

    Raises:
        ValueError: safetensors has no name for a tensor's dtype.
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
        pieces.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def dumps(tensors: Mapping[str, "Tensor"]) -> bytes:
    """The whole blob; every tensor's bytes are copied once. Raises ValueError as `chunks`."""
    return b"".join(chunks(tensors))


def loads(data: bytes, max_header: int = MAX_HEADER) -> dict[str, "Tensor"]:
    """The tensors of a blob as views of it: they keep `data` alive, and must not be written to.

    Nothing is trusted: lengths, offsets and shapes have to agree, and every tensor has to begin where its numbers may.

    Args:
        max_header: bytes of the header at most; parsed, JSON may take more than twenty times as much memory.

    Raises:
        ValueError: it is not a safetensors blob.
    """
    import torch

    size = int.from_bytes(data[:8], "little")
    start = 8 + size
    if len(data) < 8 or start > len(data):
        raise ValueError("its header is longer than it is")
    if size > max_header:
        raise ValueError(f"its header has {size} bytes, where at most {max_header} are expected")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda place: place[1][2:]):
        if begin != at:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        at = end
    if start + at != len(data):
        raise ValueError("its tensors and its length differ")
    if start % 8:
        raise ValueError("its header does not end at a multiple of 8 bytes")
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's reminder that such memory must not be written to
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
        raise ValueError(f"{name[:80]} has another size than its shape says")
    return kind, list(shape), begin, end

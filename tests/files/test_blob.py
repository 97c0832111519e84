"""Tensors as safetensors without copies: the bytes of the library itself, and nothing believed that is read."""

import json

import pytest
import torch
from safetensors.torch import load, save

from hfedmoe.files.blob import Rows, chunks, dumps, loads

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(7),
    "strided": torch.arange(12.0).reshape(3, 4).T,
}


def test_the_bytes_are_those_of_safetensors() -> None:
    assert dumps(TENSORS) == save({name: tensor.contiguous() for name, tensor in TENSORS.items()})


@pytest.mark.parametrize("index", [[0, 2], [1], [], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("tensor", [torch.arange(24.0).reshape(4, 2, 3), torch.arange(20.0).bfloat16().reshape(5, 4).T])
def test_rows_are_written_as_a_tensor_of_them(tensor: torch.Tensor, index: list[int]) -> None:
    rows = torch.tensor(index, dtype=torch.int64)
    assert dumps({"x": Rows(tensor, rows), "y": tensor}) == dumps({"x": tensor[rows], "y": tensor})


def test_rows_share_memory_with_their_tensor() -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    _, first, last = chunks({"x": Rows(tensor, torch.tensor([0, 3]))})
    assert (first.ctypes.data, last.ctypes.data) == (tensor.data_ptr(), tensor[3].data_ptr())


def test_it_comes_back_and_the_library_reads_it_too() -> None:
    blob = dumps(TENSORS)
    for read in (loads(blob), load(blob)):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert torch.equal(read[name].nan_to_num(), tensor.nan_to_num())


def test_reading_and_writing_share_memory() -> None:
    tensor = torch.arange(4.0)
    assert chunks({"x": tensor})[1].ctypes.data == tensor.data_ptr()
    blob = bytearray(dumps({"x": tensor}))
    (read,) = loads(blob).values()  # type: ignore[arg-type]
    blob[-4:] = torch.tensor(9.0).numpy().tobytes()
    assert read.tolist() == [0, 1, 2, 9]


def crafted(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def text(header: object, length: int) -> bytes:
    return json.dumps(header).encode().ljust(length)


def entry(shape: object, begin: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "longer than the data"),
        ((2**63).to_bytes(8, "little"), "longer than the data"),
        (crafted(b"{"), "not JSON"),
        (crafted(b"[" * 100_000), "not JSON"),
        (crafted([1]), "not a JSON object"),
        (crafted({"x": 1}), "not described"),
        (crafted({"x": entry([1], 0, 4, "F99")}, bytes(4)), "not described"),
        (crafted({"x": entry([-1], 0, 4)}, bytes(4)), "the size of its shape"),
        (crafted({"x": entry([1.0], 0, 4)}, bytes(4)), "the size of its shape"),
        (crafted({"x": entry([2], 0, 4)}, bytes(4)), "the size of its shape"),
        (crafted({"x": entry([1], 4, 8)}, bytes(8)), "does not begin"),
        (crafted({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, bytes(4)), "does not begin"),
        (crafted({"x": entry([1], 0, 4)}, bytes(8)), "length is not that of"),
        (crafted({"x": entry([2], 0, 8)}, bytes(4)), "length is not that of"),
        (crafted({"x": entry([1] * 9, 0, 4)}, bytes(4)), "more than 8 dimensions"),
        (crafted({"x": entry([2**61] * 100_000, 0, 4)}, bytes(4)), "more than 8 dimensions"),
        (crafted(text({"x": entry([1], 0, 4)}, 81), bytes(4)), "multiple of 8"),
        (crafted(text({"a": entry([1], 0, 1, "U8"), "x": entry([1], 1, 5)}, 160), bytes(5)), "x does not begin at a"),
    ],
)
def test_what_does_not_agree_is_refused(blob: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loads(blob)

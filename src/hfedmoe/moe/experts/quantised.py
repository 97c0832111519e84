"""How the frozen weights of an expert are held in memory: unchanged, in 16 bit, or quantised to 8 or 4 bit.

A `Stored` holds one tensor and returns it in the precision of the pass. A quantised tensor has blocks of 64 values with
one scale each. It is dequantised on every call, one tensor at a time; nothing is cached:

* 8 bit: one byte per value, dynamic code (Dettmers et al., arXiv 2110.02861), float32 scales: 8.5 bits per value;
* 4 bit: NF4 with double quantisation (QLoRA, Dettmers et al., arXiv 2305.14314): the scales minus their mean are
  quantised to 8 bit in blocks of 256: 4.127 bits per value.

The code tables (256 and 16 float32) are the same for all tensors: they are held once per process and device, and no
byte count includes them. bitsandbytes quantises and dequantises, on the device of the tensor.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hfedmoe.errors import UserError

BLOCK = 64
"""Values that share a scale. 64 is the smallest number that bitsandbytes has for 8 bit on every device."""
NESTED_BLOCK = 256
"""Scales that share a second-level scale (4 bit)."""
_CHUNK = 1 << 18  # values quantised at once: bounds the float32 temporaries to a few MB; a multiple of BLOCK


class Stored(Protocol):
    """One tensor, plain or quantised."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """All bytes it holds, scales included."""
        ...

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """The tensor [shape] in `dtype`; do not write to it."""
        ...


class Plain:
    """Holds a tensor as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def copy(self) -> "Plain":
        """The same in memory of its own."""
        return Plain(self.tensor.clone(memory_format=torch.contiguous_format))


class Quantised8:
    """Holds a float tensor in 8 bit. The tensor itself is not kept.

    Raises:
        UserError: bitsandbytes is not installed.
    """

    def __init__(self, tensor: Tensor) -> None:
        functional = _bitsandbytes("8bit")
        self.shape = tuple(tensor.shape)
        self._data = torch.empty(tensor.numel(), dtype=torch.uint8, device=tensor.device)
        scales, code = [], _dynamic_code(tensor.device)
        for start, values in _chunks(tensor):
            data, state = functional.quantize_blockwise(values, code=code, blocksize=BLOCK)
            self._data[start : start + values.numel()] = data
            scales.append(state.absmax)
        self._scales = torch.cat(scales)

    @classmethod
    def of(cls, shape: tuple[int, ...], data: Tensor, scales: Tensor) -> "Quantised8":
        """One of these `parts`."""
        new = cls.__new__(cls)
        new.shape, new._data, new._scales = shape, data, scales
        return new

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Values uint8 [V] and scales float32 [V / BLOCK]."""
        return self._data, self._scales

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """float32 [256]: what each byte means."""
        return (_dynamic_code(self._data.device),)

    def copy(self) -> "Quantised8":
        """The same in memory of its own."""
        return self.of(self.shape, *(part.clone() for part in self.parts))

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + self._scales.nbytes

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return _dequantised_8(self._data, self._scales, BLOCK, _float(dtype)).view(self.shape).to(dtype)


class Quantised4:
    """Holds a float tensor in 4 bit. The tensor itself is not kept.

    Raises:
        UserError: bitsandbytes is not installed.
    """

    def __init__(self, tensor: Tensor) -> None:
        functional = _bitsandbytes("4bit")
        self.shape = tuple(tensor.shape)
        self._data = torch.empty(math.ceil(tensor.numel() / 2), dtype=torch.uint8, device=tensor.device)
        parts = []
        for start, values in _chunks(tensor):
            data, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            self._data[start // 2 : start // 2 + data.numel()] = data.view(-1)
            parts.append(state.absmax)
        scales = torch.cat(parts)
        self._mean = scales.mean()
        self._scales, state = functional.quantize_blockwise(
            scales - self._mean, code=_dynamic_code(tensor.device), blocksize=NESTED_BLOCK
        )
        self._nested = state.absmax

    @classmethod
    def of(cls, shape: tuple[int, ...], data: Tensor, scales: Tensor, nested: Tensor, mean: Tensor) -> "Quantised4":
        """One of these `parts`."""
        new = cls.__new__(cls)
        new.shape, new._data, new._scales, new._nested, new._mean = shape, data, scales, nested, mean
        return new

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Pairs of values uint8 [V / 2], scales uint8 [V / BLOCK], the scales of these, and their mean float32 []."""
        return self._data, self._scales, self._nested, self._mean

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """float32 [16] and [256]: what each half of a byte means, and each byte of a scale."""
        return _normal_code(self._data.device), _dynamic_code(self._data.device)

    def copy(self) -> "Quantised4":
        """The same in memory of its own."""
        return self.of(self.shape, *(part.clone() for part in self.parts))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts)

    def __call__(self, dtype: torch.dtype) -> Tensor:
        functional = _bitsandbytes("4bit")
        scales = _dequantised_8(self._scales, self._nested, NESTED_BLOCK, torch.float32).add_(self._mean)
        # As one row of even length: odd shapes would take a path that is compiled again for every shape.
        state = functional.QuantState(
            scales, torch.Size((1, 2 * self._data.numel())), None, BLOCK, "nf4", dtype=_float(dtype)
        )
        values = functional.dequantize_4bit(self._data[:, None], state).view(-1)
        return values[: math.prod(self.shape)].view(self.shape).to(dtype)


def store_as(tensor: Tensor, expert_dtype: str, dtype: torch.dtype) -> Stored:
    """Hold a float tensor as `model.expert_dtype` says.

    The result holds only the tensor's own values: a view of a larger tensor is copied. Only a tensor that needs no
    change is shared with the caller. Vectors (biases) are never quantised: they are kept in `dtype`.

    Args:
        expert_dtype: "same" (as `dtype`), "float32", "bfloat16", "float16", "8bit" or "4bit".
        dtype: of the model's other frozen weights.

    Raises:
        UserError: bitsandbytes is needed and not installed.
    """
    tensor = tensor.detach()
    if _is_quantised(tensor.shape, expert_dtype):
        return Quantised8(tensor) if expert_dtype == "8bit" else Quantised4(tensor)
    plain = tensor.to(_plain_dtype(expert_dtype, dtype))
    if plain.untyped_storage().nbytes() != plain.nbytes:
        plain = plain.clone(memory_format=torch.contiguous_format)
    return Plain(plain)


def stored_bytes(shape: Sequence[int], expert_dtype: str, dtype: torch.dtype) -> int:
    """Bytes that `store_as` would hold for a tensor of this shape."""
    values = math.prod(shape)
    if not _is_quantised(shape, expert_dtype):
        return values * _plain_dtype(expert_dtype, dtype).itemsize
    blocks = math.ceil(values / BLOCK)
    if expert_dtype == "8bit":
        return values + 4 * blocks
    return math.ceil(values / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4


def _is_quantised(shape: Sequence[int], expert_dtype: str) -> bool:
    return expert_dtype in ("8bit", "4bit") and len(shape) > 1


def _plain_dtype(expert_dtype: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if expert_dtype in ("same", "8bit", "4bit") else getattr(torch, expert_dtype)


def _float(dtype: torch.dtype) -> torch.dtype:
    """The precision to dequantise to: bitsandbytes supports three."""
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _chunks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, values [n]) of a tensor in row-major order; all but the last hold a multiple of BLOCK values.

    A view of two dimensions that is not contiguous is copied a chunk at a time, one of more dimensions whole.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(BLOCK, _CHUNK // rows.shape[1] // BLOCK * BLOCK)
    for start in range(0, rows.shape[0], step):
        values = rows[start : start + step].reshape(-1)
        # bitsandbytes supports three precisions; float32 takes the same path on every device.
        yield start * rows.shape[1], values.float()


def _dequantised_8(data: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes("8bit")
    state = functional.QuantState(scales, code=_dynamic_code(data.device), blocksize=block, dtype=dtype)
    return functional.dequantize_blockwise(data, state)


@functools.cache
def _dynamic_code(device: torch.device) -> Tensor:
    """The 256 values of the dynamic 8 bit code."""
    return _bitsandbytes("8bit").create_dynamic_map().to(device)


@functools.cache
def _normal_code(device: torch.device) -> Tensor:
    """The 16 values of NF4."""
    return _bitsandbytes("4bit").get_4bit_type("nf4", device=device)


def _bitsandbytes(expert_dtype: str) -> Any:
    try:
        from bitsandbytes import functional
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":  # it is installed, but one of its own imports fails
            raise
        raise UserError(
            f'model.expert_dtype = "{expert_dtype}" needs bitsandbytes: pip install "hfedmoe[quantised]"'
        ) from None
    return functional

"""One tensor of all present experts of a layer in one piece of memory, as grouped products need it.

Plain matrices get room for LoRA beside them. Quantised ones stay quantised: they are dequantised to a scratch buffer
for every product, all experts in one pass. All layers share the buffer, so it is as large as the largest layer.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hfedmoe.moe.experts import rows
from hfedmoe.moe.experts.quantised import Plain, Quantised4, Quantised8, Stored
from hfedmoe.moe.experts.room import Joined, Roomy, backward_factor, forward_factor


class Bank(Protocol):
    """A tensor of all present experts of a layer."""

    def joined(self, room: int, dtype: torch.dtype, transposed: bool) -> Joined | None:
        """The matrices with so much room beside them; None if they are held in another precision."""
        ...

    def stored(self, place: int) -> Stored:
        """One expert's matrix, where it is now."""
        ...

    def apart(self, place: int) -> Stored:
        """A copy of one expert's matrix in memory of its own."""
        ...


class Scratch:
    """Memory that is used again and again; what is in it lasts until the next call."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any contents."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._memory is None or self._memory.device != device or self._memory.numel() < size:
            self._memory = None  # before the next one is made
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory[:size].view(dtype).view(*shape)


class PlainBank:
    """Matrices that are not quantised."""

    def __init__(self, held: Sequence[Plain]) -> None:
        self._held: list[Plain] = list(held)
        self._roomy: Roomy | None = None

    def joined(self, room: int, dtype: torch.dtype, transposed: bool) -> Joined | None:
        first = self._held[0].tensor
        if first.dtype != dtype:
            return None
        if self._roomy is None or self._roomy.room < room:
            roomy = Roomy.for_matrices(len(self._held), first, room, transposed)
            for place, stack in enumerate(roomy.stack):
                stack.copy_(self._held[place].tensor)
                self._held[place] = Plain(stack)  # the matrix of before is free now
            self._roomy = roomy
        return self._roomy

    def stored(self, place: int) -> Plain:
        return self._held[place]

    def apart(self, place: int) -> Plain:
        return self._held[place].copy()


class QuantisedBank:
    """Matrices of 8 or of 4 bit."""

    def __init__(self, held: Sequence[Quantised8 | Quantised4], scratch: Scratch) -> None:
        kind, self._scratch = type(held[0]), scratch
        self._parts = [torch.stack(parts) for parts in zip(*(one.parts for one in held), strict=True)]
        shape = held[0].shape
        self._held = [kind.of(shape, *parts) for parts in zip(*self._parts, strict=True)]

    def joined(self, room: int, dtype: torch.dtype, transposed: bool) -> Joined | None:
        return _Dequantised(self, room, dtype, transposed)

    def stored(self, place: int) -> Quantised8 | Quantised4:
        return self._held[place]

    def apart(self, place: int) -> Quantised8 | Quantised4:
        return self._held[place].copy()

    def dequantised(self, room: int, dtype: torch.dtype) -> Tensor:
        """All matrices, in a buffer [n, height + room, width + room]. It lasts until the next call."""
        first = self._held[0]
        height, width = first.shape
        shape = (len(self._held), height + room, width + room)
        buffer = self._scratch.of(shape, dtype, first.parts[0].device)
        out = buffer[:, :height, :width]
        if not rows.dequantise(self._parts, first.codes, out):
            for place, one in enumerate(self._held):
                out[place].copy_(one(dtype))
        return buffer


class _Dequantised:
    def __init__(self, bank: QuantisedBank, room: int, dtype: torch.dtype, transposed: bool) -> None:
        self._bank, self._room, self._dtype, self._transposed = bank, room, dtype, transposed

    def forward(self, b: Tensor | None) -> Tensor:
        return forward_factor(self._buffer(), self._room, b)

    def backward(self, a: Tensor | None) -> Tensor:
        return backward_factor(self._buffer(), self._room, a)

    def _buffer(self) -> Tensor:
        buffer = self._bank.dequantised(self._room, self._dtype)
        return buffer.transpose(1, 2) if self._transposed else buffer


def bank_of(held: Sequence[Stored], scratch: Scratch) -> Bank | None:
    """The bank of some experts' matrices; None if they are not held alike."""
    if all(isinstance(one, Plain) for one in held):
        return PlainBank([one for one in held if isinstance(one, Plain)])
    quantised = [one for one in held if isinstance(one, Quantised8 | Quantised4)]
    alike = len(quantised) == len(held) and len({type(one) for one in quantised}) == 1
    return QuantisedBank(quantised, scratch) if alike else None

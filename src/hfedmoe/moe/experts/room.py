"""Stacks of base matrices with room for LoRA's, so that both are one matrix product.

    x W' + l B' = [x l] [W B]'        l = c x A'    [S, R]
    g W + l A = [g l] [W; A]          l = c g B     [S, R]

A product that is added to another costs a pass over its result; columns beside W cost a few percent of the product.
One buffer [E, out + R, in + R] holds W with B to its right and A below it. `E` experts, `R` rank.
"""

from typing import Protocol

import torch
from torch import Tensor

ALIGNED = 8
"""Columns: R is rounded up to a multiple of it. Torch's grouped products need rows of 16-byte multiples, in 16 bit."""


class Joined(Protocol):
    """The matrices of a layer's experts, ready to be multiplied together with LoRA's."""

    def forward(self, b: Tensor | None) -> Tensor:
        """[E, in + R, out], the factor of [x l]; b [E, out, R], or None without LoRA (R = 0). Until the next call."""
        ...

    def backward(self, a: Tensor | None) -> Tensor:
        """[E, out + R, in], the factor of [g l]; a [E, R, in], or None without LoRA (R = 0). Until the next call."""
        ...


class Roomy:
    """Matrices in a buffer [E, out + room, in + room], or [E, in + room, out + room] where `transposed`."""

    def __init__(self, buffer: Tensor, room: int, transposed: bool = False) -> None:
        self.buffer, self.room, self._transposed = buffer, room, transposed

    @classmethod
    def for_matrices(cls, number: int, like: Tensor, room: int, transposed: bool = False) -> "Roomy":
        """Room for so many matrices of the shape of `like`; nothing is copied."""
        rows, columns = like.shape
        return cls(like.new_empty(number, rows + room, columns + room), room, transposed)

    @property
    def stack(self) -> Tensor:
        """The matrices as they are stored, without the room around them; a view."""
        _, rows, columns = self.buffer.shape
        return self.buffer[:, : rows - self.room, : columns - self.room]

    def forward(self, b: Tensor | None) -> Tensor:
        """As `Joined.forward`."""
        return forward_factor(self._logical, self.room, b)

    def backward(self, a: Tensor | None) -> Tensor:
        """As `Joined.backward`."""
        return backward_factor(self._logical, self.room, a)

    @property
    def _logical(self) -> Tensor:
        return self.buffer.transpose(1, 2) if self._transposed else self.buffer


def forward_factor(buffer: Tensor, room: int, b: Tensor | None) -> Tensor:
    """Write b [E, out, R] to the room of buffer [E, out + room, in + room]; returns the view [E, in + R, out].

    R is rounded up with columns of zeros, as by `room_for`; so it is in `backward_factor`.
    """
    rows, columns, rank = buffer.shape[1] - room, buffer.shape[2] - room, 0 if b is None else b.shape[2]
    until = columns + room_for(rank)
    if b is not None:
        buffer[:, :rows, columns : columns + rank].copy_(b)
        if until > columns + rank:
            buffer[:, :rows, columns + rank : until].zero_()
    return buffer[:, :rows, :until].transpose(1, 2)


def backward_factor(buffer: Tensor, room: int, a: Tensor | None) -> Tensor:
    """Write a [E, R, in] to the room of buffer [E, out + room, in + room]; returns the view [E, out + R, in]."""
    rows, columns, rank = buffer.shape[1] - room, buffer.shape[2] - room, 0 if a is None else a.shape[1]
    until = rows + room_for(rank)
    if a is not None:
        buffer[:, rows : rows + rank, :columns].copy_(a)
        if until > rows + rank:
            buffer[:, rows + rank : until, :columns].zero_()
    return buffer[:, :until, :columns]


def room_for(rank: int) -> int:
    """Columns of room that LoRA of this rank needs."""
    return -(-rank // ALIGNED) * ALIGNED


def scaled(stack: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """stack [E, R, D] times scale in another precision, with R rounded up by rows of zeros."""
    number, rank, columns = stack.shape
    room = room_for(rank)
    out = stack.new_empty(number, room, columns, dtype=dtype)
    torch.mul(stack, scale, out=out[:, :rank])
    if room > rank:
        out[:, rank:].zero_()
    return out

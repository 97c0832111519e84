"""The base weights of a layer's experts, as four products on grouped rows.

Every kind of storage has the same four products, so the expert forward and backward are written only once:
`up` and `down` for the forward pass, `up_t` and `down_t` for the gradients of their inputs. The caller can pass
low-rank terms as `rows`; the base product is added to them in place. `T` tokens, `S` sorted (token, expert) pairs,
`H` hidden, `U` width of the up projection (2I with a gate, else I), `I` intermediate.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hfedmoe.moe.experts import matmul
from hfedmoe.moe.experts.groups import Groups
from hfedmoe.moe.experts.room import Joined, Roomy


class ExpertBase(Protocol):
    """Products with the base weights of the experts."""

    num_experts: int

    def up(self, x: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        """x [T, H], and as `rows` [S, H] with one row per pair -> [S, U]: the up projection of every pair."""
        ...

    def up_t(self, grad: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        """grad [S, U] (plus `rows` [S, H]) -> [T, H]: gradient of `up` with respect to x."""
        ...

    def down(self, a: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        """a [S, I], already weighted (plus `rows` [S, H]) -> [T, H]: down projections added up per token."""
        ...

    def down_t(self, grad: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        """grad [T, H], and as `rows` [S, H] with one row per pair -> [S, I]: gradient of `down` with respect to a."""
        ...

    def joined(self, room: int, dtype: torch.dtype) -> tuple[Joined, Joined] | None:
        """The up and the down projections with room for LoRA beside them, for grouped products in `dtype`.

        None if the experts are not held in a way that allows it.
        """
        ...


class Weights(Protocol):
    """One matrix `[rows, columns]` per expert, in any kind of storage."""

    num_experts: int
    rows: int
    columns: int

    def __call__(self, expert: int, dtype: torch.dtype) -> Tensor: ...

    def joined(self, room: int, dtype: torch.dtype) -> Joined | None:
        """As `ExpertBase.joined`."""
        ...


def add_product(rows: Tensor | None, left: Tensor, weights: Weights, groups: Groups, *, t: bool) -> Tensor:
    """rows[s:e] += left[s:e] @ W_expert (or its transpose) for every group; allocates `rows` if it is None.

    If `rows` has another precision than `left`, or a `rounded_product` is used, the result is new memory in the
    precision of `left`.
    """
    if rows is not None and (rows.dtype != left.dtype or matmul.makes_code(left)):
        return add_product(None, left, weights, groups, t=t).add_(rows)
    stack = weights.whole(left.dtype) if isinstance(weights, StackedWeights) else None
    if stack is not None:
        stack = stack.transpose(1, 2) if t else stack
        if rows is None:
            return matmul.product(left, stack, groups)
        matmul.add_product(rows, left, stack, groups)
        return rows
    columns = weights.rows if t else weights.columns

    def matrix(expert: int) -> Tensor:
        weight = weights(expert, left.dtype)
        return weight.t() if t else weight

    if matmul.makes_code(left):
        return matmul.rounded_product(left, matrix, columns, groups)
    fresh = rows is None
    if rows is None:
        rows = left.new_empty(groups.size, columns)
    for (expert, _, _), own, target in zip(groups.spans, groups.split(left), groups.split(rows), strict=True):
        if fresh:
            torch.mm(own, matrix(expert), out=target)
        else:
            target.addmm_(own, matrix(expert))
    return rows


class StackedWeights:
    """Matrices stored as one tensor `[E, rows, columns]`, or `[E, columns, rows]` where `transposed`.

    Args:
        moved: called if `joined` has moved the matrices, with the stack at its new place; None: nobody else holds it.
        movable: whether they may move.
    """

    def __init__(
        self,
        stack: Tensor,
        transposed: bool = False,
        moved: Callable[[Tensor], None] | None = None,
        movable: bool = True,
    ) -> None:
        self.stack, self.transposed = stack, transposed
        self.num_experts = stack.shape[0]
        self.rows, self.columns = (stack.shape[2], stack.shape[1]) if transposed else (stack.shape[1], stack.shape[2])
        self._moved, self._movable = moved, movable
        self._roomy: Roomy | None = None

    def __call__(self, expert: int, dtype: torch.dtype) -> Tensor:
        weight = self.stack[expert].to(dtype)
        return weight.t() if self.transposed else weight

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """All matrices [E, rows, columns]; None if they are stored in another precision."""
        if self.stack.dtype != dtype:
            return None
        return self.stack.transpose(1, 2) if self.transposed else self.stack

    def joined(self, room: int, dtype: torch.dtype) -> Joined | None:
        """As `ExpertBase.joined`: the matrices move to where there is room, once."""
        if self.stack.dtype != dtype:
            return None
        if room == 0:
            return Roomy(self.stack, 0, self.transposed)
        if not self._movable:
            return None
        if self._roomy is None or self._roomy.room < room:
            self._roomy = Roomy.for_matrices(len(self.stack), self.stack[0], room, self.transposed)
            self._roomy.stack.copy_(self.stack)
            self.stack = self._roomy.stack
            if self._moved is not None:
                self._moved(self.stack)
        return self._roomy


class ListedWeights:
    """Matrices stored one by one, as in models with one module per expert."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices = matrices
        self.num_experts = len(matrices)
        self.rows, self.columns = matrices[0].shape

    def __call__(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.matrices[expert].to(dtype)

    def joined(self, room: int, dtype: torch.dtype) -> Joined | None:
        """None: they are not in one stack."""
        return None


class SeparateBase:
    """Every expert has its own matrices: `up` [U, H] and `down` [H, I]."""

    def __init__(self, up: Weights, down: Weights) -> None:
        self._up, self._down = up, down
        self.num_experts = up.num_experts

    def up(self, x: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        return add_product(None, rows, self._up, groups, t=True)

    def up_t(self, grad: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        return groups.sum_per_token(add_product(rows, grad, self._up, groups, t=False))

    def down(self, a: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        return groups.sum_per_token(add_product(rows, a, self._down, groups, t=True))

    def down_t(self, grad: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        return add_product(None, rows, self._down, groups, t=False)

    def joined(self, room: int, dtype: torch.dtype) -> tuple[Joined, Joined] | None:
        sizes = (self._up.rows, self._up.columns, self._down.columns)
        if any(size * dtype.itemsize % matmul.ALIGNMENT for size in sizes):
            return None
        up = self._up.joined(room, dtype)
        down = None if up is None else self._down.joined(room, dtype)
        return None if up is None or down is None else (up, down)


class SharedBase:
    """All experts have the same frozen matrices (a freshly upcycled model): `up` [U, H], `down` [H, I].

    The products are linear, so each is computed once per token and not once per pair: half the work for top-2
    routing, with the same result up to rounding.
    """

    def __init__(self, up: Tensor, down: Tensor, num_experts: int) -> None:
        self._up, self._down = up, down
        self.num_experts = num_experts

    def up(self, x: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        return (x @ self._up.to(x.dtype).t()).index_select(0, groups.token)

    def up_t(self, grad: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        out = groups.sum_per_token(grad) @ self._up.to(grad.dtype)
        return out if rows is None else out.add_(groups.sum_per_token(rows))

    def down(self, a: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        out = groups.sum_per_token(a) @ self._down.to(a.dtype).t()
        return out if rows is None else out.add_(groups.sum_per_token(rows))

    def down_t(self, grad: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        return (grad @ self._down.to(grad.dtype)).index_select(0, groups.token)

    def joined(self, room: int, dtype: torch.dtype) -> tuple[Joined, Joined] | None:
        """None: one product per token costs less than one per pair."""
        return None


def base_of(
    up: Tensor,
    down: Tensor,
    transposed: bool = False,
    moved: Callable[[str, Tensor], None] | None = None,
    movable: bool = True,
) -> ExpertBase:
    """The base for stacks `up` and `down`: a `SharedBase` if both are expanded from one matrix (stride 0).

    Args:
        moved: as of `StackedWeights`, with "up" or "down" before the stack; `movable` likewise.
    """
    if up.stride(0) == 0 and down.stride(0) == 0 and up.shape[0] > 1 and not transposed:
        return SharedBase(up[0], down[0], up.shape[0])
    follow = {kind: None if moved is None else partial(moved, kind) for kind in ("up", "down")}
    return SeparateBase(
        StackedWeights(up, transposed, follow["up"], movable), StackedWeights(down, transposed, follow["down"], movable)
    )

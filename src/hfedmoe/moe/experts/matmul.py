"""Products of rows that are sorted by expert with a matrix per expert: one grouped call where torch has a kernel.

On a GPU that is one kernel in place of a launch per expert for bfloat16 on Hopper and data-centre Blackwell. On others
torch itself waits for the groups' ends and launches a product for each, so there is a call per group here, as for rows
of a size that is no multiple of 16 bytes. On a processor a grouped call is the same loop of matrix products without
Python between them: what counts for the thin products of LoRA, whose matrices take less time than a call.

Factors of two precisions are multiplied in the finer one, and rows may be coarser than what is added to them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import grouped_mm

from hfedmoe.moe.experts.groups import Groups

_SMALL = 1 << 22
"""Elements of all results of `outer` together below which calls cost more than the arithmetic, on a processor."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MANY_ROWS = 128
"""Per expert: from there on its own rows in float32 fit the cache, and those of all experts do not."""
_MOST_GROUPS = 1024
"""Groups from which on torch refuses a grouped product on a GPU."""
_ALIGNMENT = 16
"""Bytes: torch's grouped kernels want the rows of every operand to begin at a multiple of it."""


def has_kernel(groups: Groups, *operands: Tensor) -> bool:
    """Whether a grouped product is the way for operands that lie in memory like these."""
    dtype = operands[0].dtype
    if dtype not in _DTYPES or any(operand.dtype != dtype for operand in operands):
        return False
    if any(isinstance(operand, FakeTensor) for operand in operands):  # torch describes the product for bfloat16 only
        return False
    device = operands[0].device
    if device.type == "cuda":
        fits = groups.size > 0 and groups.num_experts < _MOST_GROUPS and _is_one_kernel(device, dtype)
        return fits and all(_is_aligned(o) and o.data_ptr() % _ALIGNMENT == 0 for o in operands)
    return device.type == "cpu" and all(map(_is_aligned, operands))


@cache
def _is_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _is_aligned(operand: Tensor) -> bool:
    """One of the two inner dimensions is contiguous, and the other's stride is aligned."""
    rows, columns = operand.stride()[-2:]
    size = operand.element_size()
    if columns == 1 and rows >= max(1, operand.shape[-1]):
        return rows * size % _ALIGNMENT == 0
    return rows == 1 and columns >= max(1, operand.shape[-2]) and columns * size % _ALIGNMENT == 0


def are_large(groups: Groups) -> bool:
    """Whether the groups have so many rows that a call for each costs less than passes over all rows in memory."""
    return groups.size >= _MANY_ROWS * len(groups.spans)


def product(left: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    """left [S, K] times each group's own matrix of stack [E, K, N]: [S, N], in the finer precision of the two."""
    if left.dtype == stack.dtype and makes_code(left):
        return rounded_product(left, stack.__getitem__, stack.shape[2], groups)
    if has_kernel(groups, left, stack):
        return grouped_mm(left, stack, offs=groups.ends)
    rows = left.new_empty(groups.size, stack.shape[2], dtype=torch.promote_types(left.dtype, stack.dtype))
    for target, own, matrix in _by_group(rows, left, stack, groups):
        torch.mm(own, matrix, out=target)
    return rows


def add_product(rows: Tensor, left: Tensor, stack: Tensor, groups: Groups) -> None:
    """rows [S, N] += left [S, K] times each group's own matrix of stack [E, K, N]; rows keep their precision."""
    coarser = rows.dtype != left.dtype
    at_once = (left.dtype == stack.dtype and makes_code(left)) or (rows.is_cuda and has_kernel(groups, left, stack))
    if (coarser and not are_large(groups)) or at_once:
        rows.add_(product(left, stack, groups))
        return
    for target, own, matrix in _by_group(rows, left, stack, groups):
        if coarser:
            target.add_(own @ matrix)
        else:
            target.addmm_(own, matrix)


def write_product(rows: Tensor, left: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    """left [S, K] times each group's own matrix of stack [E, K, N], in place of the contents of rows [S, N].

    In fresh memory where a GPU has a kernel, and in the precision of left where that is finer and groups are small.
    """
    coarser = rows.dtype != left.dtype
    if (coarser and not are_large(groups)) or (rows.is_cuda and has_kernel(groups, left, stack)):
        return product(left, stack, groups)
    for target, own, matrix in _by_group(rows, left, stack, groups):
        if coarser:
            target.copy_(own @ matrix)
        else:
            torch.mm(own, matrix, out=target)
    return rows


def makes_code(left: Tensor) -> bool:
    """Whether products are such that a processor makes code for every number of rows: in 16 bit."""
    return left.device.type == "cpu" and left.dtype.itemsize == 2


def rounded_product(left: Tensor, matrix: Callable[[int], Tensor], columns: int, groups: Groups) -> Tensor:
    """left [S, K] times matrix(expert) [K, N = columns] of each group: [S, N], with few different numbers of rows.

    A group's rows are rounded up to those behind it, which the groups that they belong to then overwrite.
    """
    rows = left.new_empty(groups.size, columns)
    for expert, start, end in groups.spans:
        number = end - start
        step = 16 if number <= 256 else 64 if number <= 1024 else 256
        until = start + -(-number // step) * step
        until = until if until <= groups.size else end
        torch.mm(left[start:until], matrix(expert), out=rows[start:until])
    return rows


def _by_group(rows: Tensor, left: Tensor, stack: Tensor, groups: Groups) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For every group its part of rows, and its part of left and its matrix in the finer precision of these two."""
    finer = torch.promote_types(left.dtype, stack.dtype)
    for (expert, _, _), own, target in zip(groups.spans, groups.split(left), groups.split(rows), strict=True):
        yield target, own.to(finer), stack[expert].to(finer)


def outer(left: Tensor, right: Tensor, groups: Groups, dtype: torch.dtype) -> Sequence[Tensor]:
    """left' @ right of each group's rows, left [S, M] and right [S, N]: one [M, N] in `dtype` per group."""
    few = 2 * len(groups.spans) < groups.num_experts
    large = left.shape[1] * right.shape[1] * groups.num_experts > _SMALL and not left.is_cuda
    # A grouped product makes results for experts without a single row, too: they take memory and time for nothing.
    if not few and not large and has_kernel(groups, left.t(), right):
        stacked = grouped_mm(left.t(), right, offs=groups.ends).to(dtype)
        return [stacked[expert] for expert, _, _ in groups.spans]
    finer = torch.promote_types(left.dtype, right.dtype)
    pairs = zip(groups.split(left), groups.split(right), strict=True)
    return [(a.to(finer).t() @ b.to(finer)).to(dtype) for a, b in pairs]

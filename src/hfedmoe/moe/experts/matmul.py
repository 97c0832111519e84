"""Multiply rows that are sorted by expert with one matrix per expert: one grouped call if torch has a kernel.

On Hopper and data-centre Blackwell GPUs, bfloat16 needs one kernel in place of one launch per expert. On other GPUs
torch would wait for the groups' ends and launch one product per group, so this module makes one call per group. It
does the same for rows whose size is not a multiple of 16 bytes. On a CPU a grouped call is the same loop of matrix
products, but without Python in between. This matters for the thin products of LoRA, which take less time than a call.

Factors of two precisions are multiplied in the finer one. Rows may be coarser than what is added to them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import grouped_mm

from hfedmoe.moe.experts.groups import Groups

_SMALL = 1 << 22
"""Elements of all results of `outer` together; below this, calls on a CPU cost more than the arithmetic."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MANY_ROWS = 128
"""Rows per expert; from this number on, the float32 rows of one expert fit the cache but those of all do not."""
_MOST_GROUPS = 1024
"""From this number of groups on, torch refuses a grouped product on a GPU."""
ALIGNMENT = 16
"""Bytes: torch's grouped kernels need the rows of every operand to begin at a multiple of it."""


def has_kernel(groups: Groups, *operands: Tensor) -> bool:
    """Whether to use a grouped product for operands of this device, precision and memory layout."""
    dtype = operands[0].dtype
    if dtype not in _DTYPES or any(operand.dtype != dtype for operand in operands):
        return False
    if any(isinstance(operand, FakeTensor) for operand in operands):  # torch fakes it for bfloat16 only
        return False
    device = operands[0].device
    if device.type == "cuda":
        fits = groups.size > 0 and groups.num_experts < _MOST_GROUPS and _is_one_kernel(device, dtype)
        return fits and all(_is_aligned(o) and o.data_ptr() % ALIGNMENT == 0 for o in operands)
    return device.type == "cpu" and all(map(_is_aligned, operands))


def joins(x: Tensor, groups: Groups) -> bool:
    """Whether to compute inputs x with `joined.JoinedExperts`: on a GPU with a grouped kernel."""
    return x.is_cuda and has_kernel(groups, x)


@cache
def _is_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _is_aligned(operand: Tensor) -> bool:
    """Whether one of the last two dimensions is contiguous and the stride of the other is aligned."""
    rows, columns = operand.stride()[-2:]
    size = operand.element_size()
    if columns == 1 and rows >= max(1, operand.shape[-1]):
        return rows * size % ALIGNMENT == 0
    return rows == 1 and columns >= max(1, operand.shape[-2]) and columns * size % ALIGNMENT == 0


def are_large(groups: Groups) -> bool:
    """Whether the groups are so large that one call per group costs less than passes over all rows in memory."""
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
    """left [S, K] times each group's own matrix of stack [E, K, N], written over rows [S, N].

    The result is new memory if a GPU has a kernel, or if left has another precision and the groups are small.
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
    """Whether products with left are compiled for every new number of rows: in 16 bit on a CPU."""
    return left.device.type == "cpu" and left.dtype.itemsize == 2


def rounded_product(left: Tensor, matrix: Callable[[int], Tensor], columns: int, groups: Groups) -> Tensor:
    """left [S, K] times matrix(expert) [K, N = columns] of each group: [S, N], with few different numbers of rows.

    The number of rows is rounded up with rows of the next groups; these groups then overwrite the extra results.
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
    """For every group: its part of rows, its part of left and its matrix; the last two in their finer precision."""
    finer = torch.promote_types(left.dtype, stack.dtype)
    for (expert, _, _), own, target in zip(groups.spans, groups.split(left), groups.split(rows), strict=True):
        yield target, own.to(finer), stack[expert].to(finer)


def outer(left: Tensor, right: Tensor, groups: Groups, dtype: torch.dtype) -> Sequence[Tensor]:
    """left' @ right of each group's rows, left [S, M] and right [S, N]: one [M, N] in `dtype` per group."""
    few = 2 * len(groups.spans) < groups.num_experts
    large = left.shape[1] * right.shape[1] * groups.num_experts > _SMALL and not left.is_cuda
    # A grouped product also makes results for experts without rows, which wastes memory and time.
    if not few and not large and has_kernel(groups, left.t(), right):
        stacked = grouped_mm(left.t(), right, offs=groups.ends).to(dtype)
        return [stacked[expert] for expert, _, _ in groups.spans]
    finer = torch.promote_types(left.dtype, right.dtype)
    pairs = zip(groups.split(left), groups.split(right), strict=True)
    return [(a.to(finer).t() @ b.to(finer)).to(dtype) for a, b in pairs]

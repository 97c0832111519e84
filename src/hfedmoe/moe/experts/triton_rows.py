"""Triton kernels of `rows`: each reads and writes every value once. Arithmetic is in float32."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hfedmoe.moe.experts.quantised import BLOCK, NESTED_BLOCK

_COLUMNS = 1024
"""Columns that one program handles, at most."""
_VALUES = 2048
"""Values that one program dequantises."""


@triton.jit
def _gather(x, token, out, x_stride, out_stride, columns: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    source = tl.load(token + row)
    tl.store(out + row * out_stride + column, tl.load(x + source * x_stride + column, mask=inside), mask=inside)


def gather(x: Tensor, token: Tensor, out: Tensor) -> None:
    """out [S, D] = x [T, D] at token [S]."""
    block = _block(out.shape[1])
    grid = (out.shape[0], triton.cdiv(out.shape[1], block))
    _gather[grid](x, token, out, x.stride(0), out.stride(0), out.shape[1], block=block)


@triton.jit
def _sum(rows, places, out, size, row_stride, columns: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    total = tl.zeros((block,), dtype=tl.float32)
    for slot in range(top_k):
        place = tl.load(places + token * top_k + slot)
        found = tl.load(rows + place * row_stride + column, mask=inside & (place < size), other=0.0)
        total += found.to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


def sum_pairs(rows: Tensor, places: Tensor, out: Tensor) -> None:
    """out [T, D] = the sum of rows [S, D] at places [T, K], in the order of K; places from S on count as zeros."""
    block = _block(out.shape[1])
    grid = (out.shape[0], triton.cdiv(out.shape[1], block))
    _sum[grid](
        rows, places, out, rows.shape[0], rows.stride(0), out.shape[1], top_k=places.shape[1], block=block, num_warps=4
    )


@triton.jit
def _gate(u, w, out, u_stride, out_stride, columns: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    gate = tl.load(u + row * u_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * u_stride + columns + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + row).to(tl.float32)
    found = gate * tl.sigmoid(gate) * up * weight
    tl.store(out + row * out_stride + column, found.to(out.dtype.element_ty), mask=inside)


def silu_gate(u: Tensor, w: Tensor, out: Tensor) -> None:
    """out [S, I] = silu(first half of u [S, 2I]) * second half * w [S]."""
    block = _block(out.shape[1])
    grid = (out.shape[0], triton.cdiv(out.shape[1], block))
    _gate[grid](u, w, out, u.stride(0), out.stride(0), out.shape[1], block=block)


@triton.jit
def _gate_backward(
    u,
    w,
    d_a,
    a,
    d_u,
    d_w,
    u_stride,
    d_a_stride,
    a_stride,
    d_u_stride,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(w + row).to(tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        inside = column < columns
        gate = tl.load(u + row * u_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(u + row * u_stride + columns + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(d_a + row * d_a_stride + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += grad * silu * up
        tl.store(a + row * a_stride + column, (silu * up * weight).to(a.dtype.element_ty), mask=inside)
        grad = grad * weight
        d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(d_u + row * d_u_stride + column, d_gate.to(d_u.dtype.element_ty), mask=inside)
        tl.store(d_u + row * d_u_stride + columns + column, (grad * silu).to(d_u.dtype.element_ty), mask=inside)
    tl.store(d_w + row, tl.sum(total, axis=0))


def silu_gate_backward(u: Tensor, w: Tensor, d_a: Tensor, a: Tensor, d_u: Tensor, d_w: Tensor) -> None:
    """Gradients of `silu_gate`: writes its output again to a [S, I], and those of u [S, 2I] and of w (float32 [S])."""
    _gate_backward[(a.shape[0],)](
        u,
        w,
        d_a,
        a,
        d_u,
        d_w,
        u.stride(0),
        d_a.stride(0),
        a.stride(0),
        d_u.stride(0),
        a.shape[1],
        block=_block(a.shape[1]),
        num_warps=4,
    )


@triton.jit
def _dequantise_8bit(
    data,
    scales,
    code,
    out,
    matrix_stride,
    row_stride,
    values,
    width: tl.constexpr,
    per_scale: tl.constexpr,
    block: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    value = tl.program_id(0) * block + tl.arange(0, block)
    inside = value < values
    byte = tl.load(data + matrix * values + value, mask=inside, other=0).to(tl.int32)
    blocks = tl.cdiv(values, per_scale)
    scale = tl.load(scales + matrix * blocks + value // per_scale, mask=inside, other=0.0)
    found = tl.load(code + byte) * scale
    target = out + matrix * matrix_stride + (value // width).to(tl.int64) * row_stride + value % width
    tl.store(target, found.to(out.dtype.element_ty), mask=inside)


def dequantise_8bit(parts: Sequence[Tensor], codes: Sequence[Tensor], out: Tensor) -> None:
    """Write n matrices of 8 bit to out [n, height, width]; parts and codes as of `Quantised8`."""
    number, height, width = out.shape
    grid = (triton.cdiv(height * width, _VALUES), number)
    _dequantise_8bit[grid](
        *parts, *codes, out, out.stride(0), out.stride(1), height * width, width=width, per_scale=BLOCK, block=_VALUES
    )


@triton.jit
def _dequantise_4bit(
    data,
    scales,
    nested,
    mean,
    code,
    scale_code,
    out,
    matrix_stride,
    row_stride,
    values,
    width: tl.constexpr,
    per_scale: tl.constexpr,
    per_nested: tl.constexpr,
    block: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * (block // 2) + tl.arange(0, block // 2)
    pairs = (values + 1) // 2
    inside = pair < pairs
    byte = tl.load(data + matrix * pairs + pair, mask=inside, other=0).to(tl.int32)
    blocks = tl.cdiv(values, per_scale)
    number = pair // (per_scale // 2)
    quantised = tl.load(scales + matrix * blocks + number, mask=inside, other=0).to(tl.int32)
    outer = tl.load(nested + matrix * tl.cdiv(blocks, per_nested) + number // per_nested, mask=inside, other=0.0)
    scale = tl.load(scale_code + quantised) * outer + tl.load(mean + matrix)
    found = tl.interleave(tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale)
    value = tl.program_id(0) * block + tl.arange(0, block)
    target = out + matrix * matrix_stride + (value // width).to(tl.int64) * row_stride + value % width
    tl.store(target, found.to(out.dtype.element_ty), mask=value < values)


def dequantise_4bit(parts: Sequence[Tensor], codes: Sequence[Tensor], out: Tensor) -> None:
    """Write n matrices of 4 bit to out [n, height, width]; parts and codes as of `Quantised4`."""
    number, height, width = out.shape
    grid = (triton.cdiv(height * width, _VALUES), number)
    _dequantise_4bit[grid](
        *parts,
        *codes,
        out,
        out.stride(0),
        out.stride(1),
        height * width,
        width=width,
        per_scale=BLOCK,
        per_nested=NESTED_BLOCK,
        block=_VALUES,
    )


def _block(columns: int) -> int:
    return min(_COLUMNS, int(triton.next_power_of_2(columns)))

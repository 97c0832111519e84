"""What an expert layer does with rows between its matrix products, in one pass over memory each.

On a GPU these passes take as long as a third of the products, so each is one Triton kernel, which reads and writes
every value once. Elsewhere, and where Triton is not installed, torch does the same in several passes. `T` tokens, `S`
sorted (token, expert) pairs, `K` pairs per token, `I` intermediate. Results are written to memory of the caller, whose
rows may be longer than what is written to them.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def gather(x: Tensor, token: Tensor, out: Tensor) -> None:
    """out [S, D] = x [T, D] at token int64 [S]."""
    kernels = _kernels(x)
    if kernels is not None:
        kernels.gather(x, token, out)
    else:
        out.copy_(x.index_select(0, token))


def sum_pairs(rows: Tensor, places: Tensor) -> Tensor:
    """The sum of rows [S, D] at places int64 [T, K] of each token: [T, D].

    Places from S on count as zeros. Adds up in float32, always in the order of K.
    """
    kernels = _kernels(rows)
    if kernels is not None:
        out = rows.new_empty(len(places), rows.shape[1])
        kernels.sum_pairs(rows, places, out)
        return out
    total = rows.new_zeros(len(places), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for place in places.unbind(1):
        found = rows.index_select(0, place.clamp(max=len(rows) - 1))
        total += found.masked_fill_(place[:, None] >= len(rows), 0.0)
    return total.to(rows.dtype)


def silu_gate(u: Tensor, w: Tensor, out: Tensor) -> None:
    """out [S, I] = silu(first half of u [S, 2I]) * second half * w [S]."""
    kernels = _kernels(u)
    if kernels is not None:
        kernels.silu_gate(u, w, out)
    else:
        gate, up = u.chunk(2, dim=1)
        out.copy_(torch.nn.functional.silu(gate) * up * w[:, None])


def silu_gate_backward(u: Tensor, w: Tensor, d_a: Tensor, a: Tensor, d_u: Tensor) -> Tensor:
    """Gradients of `silu_gate`, given d_a [S, I] that of its output: returns that of w, float32 [S].

    Args:
        a: [S, I], receives the output of `silu_gate`.
        d_u: [S, 2I], receives the gradient of u.
    """
    kernels = _kernels(u)
    if kernels is not None:
        d_w = torch.empty(len(u), dtype=torch.float32, device=u.device)
        kernels.silu_gate_backward(u, w, d_a, a, d_u, d_w)
        return d_w
    gate, up = u.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    inner = silu * up
    a.copy_(inner * w[:, None])
    grad = d_a * w[:, None]
    d_gate, d_up = d_u.chunk(2, dim=1)
    d_gate.copy_(grad * up * sigmoid * (1 + gate * (1 - sigmoid)))
    d_up.copy_(grad * silu)
    return (d_a * inner).sum(1, dtype=torch.float32)


def dequantise(parts: Sequence[Tensor], codes: Sequence[Tensor], out: Tensor) -> bool:
    """Write n dequantised matrices to out [n, height, width], if a kernel can; whether it did.

    Args:
        parts: each [n, ...], as of `quantised.Quantised4.parts` or `Quantised8.parts`; `codes` likewise.
    """
    kernels = _kernels(out)
    if kernels is None:
        return False
    (kernels.dequantise_8bit if len(parts) == 2 else kernels.dequantise_4bit)(parts, codes, out)
    return True


def _kernels(tensor: Tensor) -> Any:
    return _of_device(tensor.device.type)


@cache
def _of_device(kind: str) -> Any:
    """The module of Triton kernels; None where they do not run."""
    if kind != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from hfedmoe.moe.experts import triton_rows

    return triton_rows

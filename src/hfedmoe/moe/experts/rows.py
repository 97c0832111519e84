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

from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.groups import Groups

_SILU = Gate(torch.nn.functional.silu, silu=True)


def gather(x: Tensor, token: Tensor, out: Tensor) -> None:
    """out [S, D] = x [T, D] at token int64 [S]."""
    kernels = _kernels(x)
    if kernels is not None:
        kernels.gather(x, token, out)
    else:
        out.copy_(x.index_select(0, token))


def sum_pairs(rows: Tensor, groups: Groups) -> Tensor:
    """The sum of rows [S, D] of each token's pairs: [T, D]; as `Groups.sum_per_token`."""
    kernels = _kernels(rows)
    if kernels is None:
        return groups.sum_per_token(rows)
    out = rows.new_empty(len(groups.places), rows.shape[1])
    kernels.sum_pairs(rows, groups.places, out)
    return out


def silu_gate(u: Tensor, w: Tensor, out: Tensor) -> None:
    """out [S, I] = silu(first half of u [S, 2I]) * second half * w [S]."""
    kernels = _kernels(u)
    if kernels is not None:
        kernels.silu_gate(u, w, out)
    else:
        out.copy_(_SILU(u, w[:, None]))


def silu_gate_backward(u: Tensor, w: Tensor, d_a: Tensor, a: Tensor, d_u: Tensor) -> Tensor:
    """Gradients of `silu_gate`, given d_a [S, I] that of its output: returns that of w [S]. May overwrite d_a.

    Args:
        a: [S, I], receives the output of `silu_gate`.
        d_u: [S, 2I], receives the gradient of u.
    """
    kernels = _kernels(u)
    if kernels is not None:
        d_w: Tensor = torch.empty(len(u), dtype=torch.float32, device=u.device)
        kernels.silu_gate_backward(u, w, d_a, a, d_u, d_w)
        return d_w
    inner, halves = _SILU.again(u)
    torch.mul(inner, w[:, None], out=a)
    d_w, found = _SILU.backward(u, w[:, None], inner, d_a, halves, None)
    d_u.copy_(found)
    return d_w


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

"""The expert forward and backward: LoRA (or full training) per group of tokens, without the full-size deltas.

For the pairs (token t, expert e) of a layer, sorted by expert, with gate weight w and LoRA scale c:

    u = x W_up' + c (x A_up') B_up'        [S, U]
    a = gate(u) * w                        [S, I]
    y = a W_down' + c (a A_down') B_down'  [S, H], added up per token

The backward pass keeps only `x`, `u` and the rank-R products. It needs no expert output for the gate's gradient,
because <dL/dy, f(x)> = <W_down' dL/dy, gate(u)>, which the backward pass computes anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfedmoe.moe.base import ExpertBase
from hfedmoe.moe.grouping import Groups

LORA = ("up_a", "up_b", "down_a", "down_b")
"""Trained matrices of an expert with LoRA: A [R, in] and B [out, R] of the up and of the down projection."""
FULL = ("up", "down", "up_bias", "down_bias")
"""Trained tensors of an expert without LoRA; the biases only where the family has them."""


@dataclass
class ExpertMath:
    """What all experts of a layer have in common."""

    base: ExpertBase
    gate: Callable[[Tensor], Tensor]
    """u [S, U] -> [S, I]: activation, and product with the ungated half where the family has one."""
    silu_gate: bool = False
    """The gate is silu(first half) * second half: its gradient is written out, which is faster."""
    scale: float = 1.0
    up_bias: Sequence[Tensor] | None = None
    down_bias: Sequence[Tensor] | None = None
    transposed: bool = False
    """Base matrices are stored [in, out], so full gradients are too."""
    dropout: float = 0.0


def experts_forward(
    math: ExpertMath, x: Tensor, weights: Tensor, groups: Groups, names: Sequence[str], leaves: list[Tensor]
) -> Tensor:
    """Outputs [T, H] of the grouped pairs, differentiable in x, weights and leaves.

    Args:
        x: [T, H].
        weights: [T * K] gate weights, in the order of the flattened routing.
        names: which tensors `leaves` holds per group: LORA, a part of FULL, or nothing (frozen experts).
        leaves: for every group in turn, one tensor per name.
    """
    return _GroupedExperts.apply(math, groups, tuple(names), x, weights, *leaves)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, math: ExpertMath, groups: Groups, names: tuple[str, ...], x: Tensor, weights: Tensor, *leaves: Tensor
    ) -> Tensor:
        w = weights[groups.pair].to(x.dtype)[:, None]
        leaf = _Leaves(names, leaves, x.dtype)
        rank = leaf.get(0, "up_a").shape[0] if leaf.lora else 0
        low_up, low_down = x.new_empty(2, groups.size, rank).unbind(0)
        u = math.base.up(x, groups)
        for position, (expert, start, end) in enumerate(groups.spans):
            if leaf.lora:
                torch.mm(x[groups.token[start:end]], leaf.get(position, "up_a").t(), out=low_up[start:end])
                u[start:end].addmm_(low_up[start:end], leaf.get(position, "up_b").t(), alpha=math.scale)
            if math.up_bias is not None:
                u[start:end] += math.up_bias[expert].to(x.dtype)
        a = math.gate(u)
        mask = None
        if math.dropout > 0:
            mask = torch.empty_like(a).bernoulli_(1 - math.dropout).div_(1 - math.dropout)
            a = a * mask
        a = a * w
        rows = x.new_zeros(groups.size, x.shape[1]) if leaf.lora or math.down_bias is not None else None
        if rows is not None:
            for position, (expert, start, end) in enumerate(groups.spans):
                if leaf.lora:
                    torch.mm(a[start:end], leaf.get(position, "down_a").t(), out=low_down[start:end])
                    scaled = low_down[start:end] * math.scale
                    torch.mm(scaled, leaf.get(position, "down_b").t(), out=rows[start:end])
                if math.down_bias is not None:
                    rows[start:end] += w[start:end] * math.down_bias[expert].to(x.dtype)
        ctx.math, ctx.groups, ctx.names, ctx.weights_like = math, groups, names, (weights.shape, weights.dtype)
        ctx.save_for_backward(x, w, u, low_up, low_down, mask, *leaves)
        return math.base.down(a, groups, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        math, groups = ctx.math, ctx.groups
        x, w, u, low_up, low_down, mask, *leaves = ctx.saved_tensors
        leaf = _Leaves(ctx.names, leaves, x.dtype, ctx.needs_input_grad[5:])
        grad = grads[0].contiguous()
        a = math.gate(u) if mask is None else math.gate(u) * mask
        d_a = math.base.down_t(grad, groups)
        _down_backward(math, groups, leaf, grad, a, w, low_down, d_a)
        d_weights = None
        if ctx.needs_input_grad[4]:
            shape, dtype = ctx.weights_like
            d_weights = torch.zeros(shape, dtype=dtype, device=x.device)
            d_weights[groups.pair] = _weight_gradient(math, groups, grad, a, d_a).to(dtype)
        del a
        d_a *= w if mask is None else w * mask
        d_u = _gate_backward(math, u, d_a)
        rows = _up_backward(math, groups, leaf, x, low_up, d_u)
        d_x = math.base.up_t(d_u, groups, rows) if ctx.needs_input_grad[3] else None
        return (None, None, None, d_x, d_weights, *leaf.grads)


class _Leaves:
    """The trained tensors of each group, cast to the precision of the pass, and their gradients."""

    def __init__(
        self,
        names: tuple[str, ...],
        leaves: Sequence[Tensor],
        dtype: torch.dtype,
        wanted: Sequence[bool] | None = None,
    ) -> None:
        self._slots = {name: slot for slot, name in enumerate(names)}
        self._leaves, self._dtype, self._wanted = leaves, dtype, wanted
        self.grads: list[Tensor | None] = [None] * len(leaves)
        self.lora = "up_a" in names and len(leaves) > 0

    def _place(self, position: int, name: str) -> int:
        return position * len(self._slots) + self._slots[name]

    def get(self, position: int, name: str) -> Tensor:
        return self._leaves[self._place(position, name)].to(self._dtype)

    def wants(self, position: int, name: str) -> bool:
        return name in self._slots and self._wanted is not None and self._wanted[self._place(position, name)]

    def put(self, position: int, name: str, grad: Tensor) -> None:
        place = self._place(position, name)
        self.grads[place] = grad.to(self._leaves[place].dtype)


def _down_backward(
    math: ExpertMath, groups: Groups, leaf: _Leaves, grad: Tensor, a: Tensor, w: Tensor, low: Tensor, d_a: Tensor
) -> None:
    """Gradients of the trained tensors of the down projection; adds the low-rank part to d_a [S, I] in place."""
    for position, (_, start, end) in enumerate(groups.spans):
        if not leaf.grads:
            return
        dy = grad[groups.token[start:end]]
        if leaf.lora:
            d_low = (dy @ leaf.get(position, "down_b")).mul_(math.scale)
            d_a[start:end].addmm_(d_low, leaf.get(position, "down_a"))
            if leaf.wants(position, "down_b"):
                leaf.put(position, "down_b", (dy.t() @ low[start:end]).mul_(math.scale))
            if leaf.wants(position, "down_a"):
                leaf.put(position, "down_a", d_low.t() @ (a[start:end] * w[start:end]))
        if leaf.wants(position, "down"):
            weighted = a[start:end] * w[start:end]
            leaf.put(position, "down", weighted.t() @ dy if math.transposed else dy.t() @ weighted)
        if leaf.wants(position, "down_bias"):
            leaf.put(position, "down_bias", (dy * w[start:end]).sum(0))


def _up_backward(math: ExpertMath, groups: Groups, leaf: _Leaves, x: Tensor, low: Tensor, d_u: Tensor) -> Tensor | None:
    """Gradients of the trained tensors of the up projection; returns the low-rank part of the gradient of x [S, H]."""
    rows = x.new_empty(groups.size, x.shape[1]) if leaf.lora else None
    for position, (_, start, end) in enumerate(groups.spans):
        if not leaf.grads:
            return None
        du = d_u[start:end]
        if rows is not None:
            d_low = (du @ leaf.get(position, "up_b")).mul_(math.scale)
            torch.mm(d_low, leaf.get(position, "up_a"), out=rows[start:end])
            if leaf.wants(position, "up_b"):
                leaf.put(position, "up_b", (du.t() @ low[start:end]).mul_(math.scale))
            if leaf.wants(position, "up_a"):
                leaf.put(position, "up_a", d_low.t() @ x[groups.token[start:end]])
        if leaf.wants(position, "up"):
            inputs = x[groups.token[start:end]]
            leaf.put(position, "up", inputs.t() @ du if math.transposed else du.t() @ inputs)
        if leaf.wants(position, "up_bias"):
            leaf.put(position, "up_bias", du.sum(0))
    return rows


def _weight_gradient(math: ExpertMath, groups: Groups, grad: Tensor, a: Tensor, d_a: Tensor) -> Tensor:
    """Gradient of the gate weight of every pair [S]."""
    d_pairs = (d_a * a).sum(1)
    if math.down_bias is not None:
        for expert, start, end in groups.spans:
            d_pairs[start:end] += grad[groups.token[start:end]] @ math.down_bias[expert].to(grad.dtype)
    return d_pairs


def _gate_backward(math: ExpertMath, u: Tensor, d_a: Tensor) -> Tensor:
    """Gradient of the gate with respect to u [S, U], given the gradient of its output d_a [S, I]."""
    if math.silu_gate:
        gate, up = u.chunk(2, dim=-1)
        d_u = torch.empty_like(u)
        d_gate, d_up = d_u.chunk(2, dim=-1)
        torch.mul(d_a, torch.nn.functional.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_a * up, gate))
        return d_u
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return torch.autograd.grad(math.gate(u), u, d_a)[0]

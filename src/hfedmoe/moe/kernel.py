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
    def forward(
        ctx: Any, math: ExpertMath, groups: Groups, names: tuple[str, ...], x: Tensor, weights: Tensor, *leaves: Tensor
    ) -> Tensor:
        w = weights[groups.pair].to(x.dtype)[:, None]
        leaf = _Leaves(names, leaves, x.dtype)
        rows = x.index_select(0, groups.token)
        u = math.base.up(x, rows, groups)
        low_up = low_down = None
        if leaf.lora:
            low_up = _low(groups, rows, leaf.all("up_a"), math.scale)
            for own, low, b in zip(groups.split(u), groups.split(low_up), leaf.all("up_b"), strict=True):
                own.addmm_(low, b.t())
        _add_bias(groups, u, math.up_bias)
        a, mask = _gate(math, u), None
        if math.dropout > 0:
            mask = torch.empty_like(a).bernoulli_(1 - math.dropout).div_(1 - math.dropout)
            a *= mask
        a *= w
        extra = None
        if leaf.lora:
            low_down = _low(groups, a, leaf.all("down_a"), math.scale)
            extra = rows  # whose contents are no longer needed
            for own, low, b in zip(groups.split(extra), groups.split(low_down), leaf.all("down_b"), strict=True):
                torch.mm(low, b.t(), out=own)
        if math.down_bias is not None:
            extra = rows.zero_() if extra is None else extra
            _add_bias(groups, extra, math.down_bias, w)
        ctx.math, ctx.groups, ctx.names, ctx.weights_like = math, groups, names, (weights.shape, weights.dtype)
        ctx.save_for_backward(x, w, u, low_up, low_down, mask, *leaves)
        return math.base.down(a, groups, extra)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        math, groups = ctx.math, ctx.groups
        x, w, u, low_up, low_down, mask, *leaves = ctx.saved_tensors
        leaf = _Leaves(ctx.names, leaves, x.dtype, ctx.needs_input_grad[5:])
        grad = grads[0].contiguous()
        rows = grad.index_select(0, groups.token)
        d_a = math.base.down_t(grad, rows, groups)
        a = _gate(math, u)
        if mask is not None:
            a *= mask
        _down_backward(math, groups, leaf, rows, a, w, low_down, d_a)
        d_weights = None
        if ctx.needs_input_grad[4]:
            shape, dtype = ctx.weights_like
            d_weights = torch.zeros(shape, dtype=dtype, device=x.device)
            d_weights[groups.pair] = _weight_gradient(math, groups, rows, a, d_a).to(dtype)
        d_a *= w
        if mask is not None:
            d_a *= mask
        d_u = _gate_backward(math, u, d_a, a)
        extra = _up_backward(math, groups, leaf, x, low_up, d_u, rows)
        d_x = math.base.up_t(d_u, groups, extra) if ctx.needs_input_grad[3] else None
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

    def all(self, name: str) -> list[Tensor]:
        """One tensor per group."""
        return [leaf.to(self._dtype) for leaf in self._leaves[self._slots[name] :: len(self._slots)]]

    def wants(self, name: str) -> bool:
        """Whether gradients of `name` are asked for: all experts are trained alike."""
        return (
            name in self._slots
            and self._wanted is not None
            and any(self._wanted[self._slots[name] :: len(self._slots)])
        )

    def put(self, name: str, grads: Sequence[Tensor]) -> None:
        """The gradients of `name`, one per group."""
        slot = self._slots[name]
        for position, grad in enumerate(grads):
            place = position * len(self._slots) + slot
            self.grads[place] = grad.to(self._leaves[place].dtype)


def _low(groups: Groups, rows: Tensor, factors: list[Tensor], scale: float) -> Tensor:
    """scale * rows @ factor' for every group: [S, D] with factors [R, D] -> [S, R]."""
    out = rows.new_empty(groups.size, factors[0].shape[0])
    for own, factor, target in zip(groups.split(rows), factors, groups.split(out), strict=True):
        torch.mm(own, factor.t(), out=target)
    return out.mul_(scale)


def _outer(groups: Groups, left: Tensor, right: Tensor, flip: bool = False) -> list[Tensor]:
    """left' @ right for every group (right' @ left where `flip`): the gradient of a matrix from its two sides."""
    pairs = zip(groups.split(left), groups.split(right), strict=True)
    return [b.t() @ a if flip else a.t() @ b for a, b in pairs]


def _add_bias(groups: Groups, rows: Tensor, bias: Sequence[Tensor] | None, w: Tensor | None = None) -> None:
    """Add each group's bias to its rows, times the gate weights w [S, 1] where they are given."""
    if bias is None:
        return
    for expert, start, end in groups.spans:
        own = bias[expert].to(rows.dtype)
        rows[start:end] += own if w is None else w[start:end] * own


def _down_backward(
    math: ExpertMath, groups: Groups, leaf: _Leaves, rows: Tensor, a: Tensor, w: Tensor, low: Tensor | None, d_a: Tensor
) -> None:
    """Gradients of the trained tensors of the down projection; adds the low-rank part to d_a [S, I] in place.

    Args:
        rows: gradient of the output, a row per pair [S, H].
    """
    if leaf.lora:
        assert low is not None
        d_low = _low(groups, rows, [b.t() for b in leaf.all("down_b")], math.scale)
        for own, d, factor in zip(groups.split(d_a), groups.split(d_low), leaf.all("down_a"), strict=True):
            own.addmm_(d, factor)
        if leaf.wants("down_b"):
            leaf.put("down_b", _outer(groups, rows, low))
        if leaf.wants("down_a"):
            leaf.put("down_a", _outer(groups, d_low * w, a))
    if leaf.wants("down"):
        leaf.put("down", _outer(groups, rows * w, a, flip=math.transposed))
    if leaf.wants("down_bias"):
        leaf.put("down_bias", [own.sum(0) for own in groups.split(rows * w)])


def _up_backward(
    math: ExpertMath, groups: Groups, leaf: _Leaves, x: Tensor, low: Tensor | None, d_u: Tensor, spare: Tensor
) -> Tensor | None:
    """Gradients of the trained tensors of the up projection; returns the low-rank part of the gradient of x [S, H].

    Args:
        spare: memory [S, H] whose contents are no longer needed.
    """
    if not leaf.grads:
        return None
    rows = torch.index_select(x, 0, groups.token, out=spare)
    if leaf.wants("up"):
        leaf.put("up", _outer(groups, d_u, rows, flip=math.transposed))
    if leaf.wants("up_bias"):
        leaf.put("up_bias", [own.sum(0) for own in groups.split(d_u)])
    if not leaf.lora:
        return None
    assert low is not None
    d_low = _low(groups, d_u, [b.t() for b in leaf.all("up_b")], math.scale)
    if leaf.wants("up_b"):
        leaf.put("up_b", _outer(groups, d_u, low))
    if leaf.wants("up_a"):
        leaf.put("up_a", _outer(groups, d_low, rows))
    for own, d, factor in zip(groups.split(rows), groups.split(d_low), leaf.all("up_a"), strict=True):
        torch.mm(d, factor, out=own)
    return rows


def _weight_gradient(math: ExpertMath, groups: Groups, rows: Tensor, a: Tensor, d_a: Tensor) -> Tensor:
    """Gradient of the gate weight of every pair [S]; overwrites a [S, I]."""
    d_pairs = a.mul_(d_a).sum(1)
    if math.down_bias is not None:
        for expert, start, end in groups.spans:
            d_pairs[start:end] += rows[start:end] @ math.down_bias[expert].to(rows.dtype)
    return d_pairs


def _gate(math: ExpertMath, u: Tensor) -> Tensor:
    """The gate in fresh memory: u [S, U] -> [S, I]."""
    if math.silu_gate:
        gate, up = u.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)
    return math.gate(u)


def _gate_backward(math: ExpertMath, u: Tensor, d_a: Tensor, spare: Tensor) -> Tensor:
    """Gradient of the gate with respect to u [S, U], given the gradient of its output d_a [S, I].

    Overwrites d_a, and `spare` [S, I].
    """
    if math.silu_gate:
        gate, up = u.chunk(2, dim=-1)
        d_u = torch.empty_like(u)
        d_gate, d_up = d_u.chunk(2, dim=-1)
        torch.mul(d_a, torch.ops.aten.silu.out(gate, out=spare), out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_a.mul_(up), gate, grad_input=d_gate)
        return d_u
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return torch.autograd.grad(math.gate(u), u, d_a)[0]

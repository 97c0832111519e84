"""The expert forward and backward: LoRA (or full training) per group of tokens, without full-size weight deltas.

For the pairs (token t, expert e) of a layer, sorted by expert, with gate weight w and LoRA scale c:

    u = x W_up' + c (x A_up') B_up'        [S, U]
    a = gate(u) * w                        [S, I]
    y = a W_down' + c (a A_down') B_down'  [S, H], added up per token

The backward pass keeps only `x`, `u` and the rank-R products. It needs no expert output for the gate's gradient,
because <dL/dy, f(x)> = <W_down' dL/dy, gate(u)>, which the backward pass computes anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import ExpertBase
from hfedmoe.moe.experts.groups import Groups
from hfedmoe.moe.experts.joined import JoinedExperts
from hfedmoe.moe.experts.matmul import add_product, are_large, joins, makes_code, outer, product, write_product
from hfedmoe.moe.experts.room import Joined, room_for

LORA = ("up_a", "up_b", "down_a", "down_b")
"""Trained matrices of an expert with LoRA: A [R, in] and B [out, R] of the up and of the down projection."""
FULL = ("up", "down", "up_bias", "down_bias")
"""Trained tensors of an expert without LoRA; biases only if the family has them."""


@dataclass
class ExpertMath:
    """What all experts of a layer have in common."""

    base: ExpertBase
    gate: Gate
    scale: float = 1.0
    up_bias: Sequence[Tensor] | None = None
    down_bias: Sequence[Tensor] | None = None
    transposed: bool = False
    """Base matrices are stored [in, out], so full gradients are too."""
    dropout: float = 0.0


def experts_forward(
    math: ExpertMath,
    x: Tensor,
    weights: Tensor,
    groups: Groups,
    stacks: Mapping[str, Tensor],
    leaves: list[Tensor],
    norms: Tensor | None = None,
) -> Tensor:
    """Outputs [T, H] of the grouped pairs, differentiable in x, weights and leaves.

    Args:
        x: [T, H].
        weights: [T * K] gate weights, in the order of the flattened routing.
        stacks: the trained tensors [E, ...] by name: LORA, a part of FULL, or nothing (frozen experts).
        leaves: group by group, its row of each stack; these rows receive the gradients.
        norms: float32 [T * K], receives ||a|| of every pair that runs; None: not measured.

    On a GPU with grouped products, `backward` sets `grad` of the leaves, and `torch.autograd.grad` gives none for them.
    """
    base = _joined_base(math, x, groups, stacks)
    if base is not None:
        anchor = next((leaf for leaf in leaves if leaf.requires_grad), None)
        return JoinedExperts.apply(base, math.scale, groups, stacks, leaves, norms, x, weights, anchor)
    return _GroupedExperts.apply(math, groups, stacks, norms, x, weights, *leaves)


def _joined_base(
    math: ExpertMath, x: Tensor, groups: Groups, stacks: Mapping[str, Tensor]
) -> tuple[Joined, Joined] | None:
    """The base for `JoinedExperts`; None if this layer, device or precision needs the general forward."""
    plain = math.gate.silu and math.up_bias is None and math.down_bias is None and math.dropout == 0
    lora_or_frozen = not stacks or tuple(stacks) == LORA
    if not (plain and lora_or_frozen and joins(x, groups)):
        return None
    return math.base.joined(room_for(stacks["up_a"].shape[1]) if stacks else 0, x.dtype)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        math: ExpertMath,
        groups: Groups,
        stacks: Mapping[str, Tensor],
        norms: Tensor | None,
        x: Tensor,
        weights: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        w = weights[groups.pair].to(x.dtype)[:, None]
        trained = _Trained(stacks, _thin_dtype(x), groups)
        rows = x.index_select(0, groups.token)
        u = math.base.up(x, rows, groups)
        low_up = low_down = None
        if trained.lora:
            low_up = product(trained.thin(rows), trained["up_a"].transpose(1, 2), groups).mul_(math.scale)
            add_product(u, low_up, trained["up_b"].transpose(1, 2), groups)
        _add_bias(groups, u, math.up_bias)
        a, mask = math.gate(u, w), None
        if math.dropout > 0:
            mask = torch.empty_like(a).bernoulli_(1 - math.dropout).div_(1 - math.dropout)
            a *= mask
        if norms is not None:
            norms[groups.pair] = torch.linalg.vector_norm(a, dim=1, dtype=torch.float32)
        extra = None
        if trained.lora:
            low_down = product(trained.thin(a), trained["down_a"].transpose(1, 2), groups).mul_(math.scale)
            # Written over rows, which are no longer needed.
            extra = write_product(rows, low_down, trained["down_b"].transpose(1, 2), groups)
        if math.down_bias is not None:
            extra = rows.zero_() if extra is None else extra
            _add_bias(groups, extra, math.down_bias, w)
        ctx.math, ctx.groups, ctx.stacks, ctx.weights_like = math, groups, stacks, (weights.shape, weights.dtype)
        ctx.save_for_backward(x, w, u, low_up, low_down, mask)
        return math.base.down(a, groups, extra)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        math, groups = ctx.math, ctx.groups
        x, w, u, low_up, low_down, mask = ctx.saved_tensors
        trained = _Trained(ctx.stacks, _thin_dtype(x), groups, ctx.needs_input_grad[6:])
        grad = grads[0].contiguous()
        rows = grad.index_select(0, groups.token)
        d_a = math.base.down_t(grad, rows, groups)
        a, d_u = math.gate.again(u)
        if mask is not None:
            a *= mask
        _down_backward(math, groups, trained, rows, a, w, low_down, d_a)
        d_pairs, d_u = math.gate.backward(u, w, a, d_a, d_u, mask)
        d_weights = None
        if ctx.needs_input_grad[5]:
            shape, dtype = ctx.weights_like
            d_weights = torch.zeros(shape, dtype=dtype, device=x.device)
            d_weights[groups.pair] = _with_bias(math, groups, rows, d_pairs).to(dtype)
        extra = _up_backward(math, groups, trained, x, low_up, d_u, rows)
        d_x = math.base.up_t(d_u, groups, extra) if ctx.needs_input_grad[4] else None
        return (None, None, None, None, d_x, d_weights, *trained.grads)


def _thin_dtype(x: Tensor) -> torch.dtype:
    """The precision of LoRA's products with inputs x: that of x, but float32 for 16 bit on a CPU.

    On a CPU, each new number of rows of a 16-bit product is compiled, and it changes from batch to batch. That takes
    longer than a thin product in float32.
    """
    return torch.float32 if makes_code(x) else x.dtype


class _Trained:
    """The trained stacks in the precision of LoRA's products, and the gradients of their rows."""

    def __init__(
        self, stacks: Mapping[str, Tensor], dtype: torch.dtype, groups: Groups, wanted: Sequence[bool] = ()
    ) -> None:
        self._slots = {name: slot for slot, name in enumerate(stacks)}
        self._stacks, self._dtype, self._wanted = stacks, dtype, wanted
        self._cast: dict[str, Tensor] = {}
        self._one_by_one = are_large(groups)
        self.grads: list[Tensor | None] = [None] * len(wanted)
        self.lora = "up_a" in stacks

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._cast:
            self._cast[name] = self._stacks[name].to(self._dtype)
        return self._cast[name]

    def thin(self, rows: Tensor) -> Tensor:
        """Rows in the precision of LoRA's products; unchanged if each group is cast by itself."""
        return rows if self._one_by_one else rows.to(self._dtype)

    def wants(self, name: str) -> bool:
        """Whether gradients of `name` are needed, for any expert."""
        return name in self._slots and any(self._wanted[self._slots[name] :: len(self._slots)])

    def put(self, name: str, grads: Sequence[Tensor]) -> None:
        """Set the gradients of `name`, one per group, in the precision of the stacks."""
        self.grads[self._slots[name] :: len(self._slots)] = grads

    def put_outer(self, name: str, left: Tensor, right: Tensor, groups: Groups, flip: bool = False) -> None:
        """Set the gradients of `name` to left' @ right for every group (right' @ left if `flip`).

        The gradient of B is stored transposed, as B is: several times faster if one side is thin.
        """
        dtype = self._stacks[name].dtype
        if name in ("up_b", "down_b"):
            self.put(name, [grad.t() for grad in outer(right, left, groups, dtype)])
        else:
            self.put(name, outer(right, left, groups, dtype) if flip else outer(left, right, groups, dtype))


def _add_bias(groups: Groups, rows: Tensor, bias: Sequence[Tensor] | None, w: Tensor | None = None) -> None:
    """Add each group's bias to its rows, times the gate weights w [S, 1] if given."""
    if bias is None:
        return
    for expert, start, end in groups.spans:
        own = bias[expert].to(rows.dtype)
        rows[start:end] += own if w is None else w[start:end] * own


def _with_bias(math: ExpertMath, groups: Groups, rows: Tensor, d_pairs: Tensor) -> Tensor:
    """Add the part of the down bias to d_pairs [S], the gradient of each pair's weight; rows as in `_down_backward`."""
    if math.down_bias is not None:
        for expert, start, end in groups.spans:
            d_pairs[start:end] += rows[start:end] @ math.down_bias[expert].to(rows.dtype)
    return d_pairs


def _down_backward(
    math: ExpertMath,
    groups: Groups,
    trained: _Trained,
    rows: Tensor,
    a: Tensor,
    w: Tensor,
    low: Tensor | None,
    d_a: Tensor,
) -> None:
    """Gradients of the trained tensors of the down projection; adds the low-rank part to d_a [S, I] in place.

    Args:
        rows: gradient of the output, one row per pair [S, H].
    """
    if trained.lora:
        assert low is not None
        thin_rows = trained.thin(rows)
        d_low = product(thin_rows, trained["down_b"], groups).mul_(math.scale)
        add_product(d_a, d_low, trained["down_a"], groups)
        if trained.wants("down_b"):
            trained.put_outer("down_b", thin_rows, low, groups)
        if trained.wants("down_a"):
            trained.put_outer("down_a", d_low * w, trained.thin(a), groups)
    if trained.wants("down"):
        trained.put_outer("down", rows * w, a, groups, flip=math.transposed)
    if trained.wants("down_bias"):
        trained.put("down_bias", [own.sum(0) for own in groups.split(rows * w)])


def _up_backward(
    math: ExpertMath,
    groups: Groups,
    trained: _Trained,
    x: Tensor,
    low: Tensor | None,
    d_u: Tensor,
    spare: Tensor,
) -> Tensor | None:
    """Gradients of the trained tensors of the up projection; returns the low-rank part of the gradient of x [S, H].

    Args:
        spare: memory [S, H] whose contents are no longer needed.
    """
    if not trained.grads:
        return None
    rows = torch.index_select(x, 0, groups.token, out=spare)
    if trained.wants("up"):
        trained.put_outer("up", d_u, rows, groups, flip=math.transposed)
    if trained.wants("up_bias"):
        trained.put("up_bias", [own.sum(0) for own in groups.split(d_u)])
    if not trained.lora:
        return None
    assert low is not None
    d_u = trained.thin(d_u)
    d_low = product(d_u, trained["up_b"], groups).mul_(math.scale)
    if trained.wants("up_b"):
        trained.put_outer("up_b", d_u, low, groups)
    if trained.wants("up_a"):
        trained.put_outer("up_a", d_low, trained.thin(rows), groups)
    return write_product(rows, d_low, trained["up_a"], groups)

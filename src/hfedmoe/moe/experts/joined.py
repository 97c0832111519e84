"""The expert forward and backward where a grouped product is one kernel: few passes over rows between the products.

It computes what `kernel` does, in the same notation. LoRA's terms are part of the base products (see `room`), each
result is written where the next product reads it, and everything else is one pass per step (see `rows`). It is meant
for GPUs: the buffers hold all pairs at once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from hfedmoe.moe.experts import rows
from hfedmoe.moe.experts.groups import Groups
from hfedmoe.moe.experts.room import Joined, room_for, scaled


class JoinedExperts(torch.autograd.Function):
    """Outputs [T, H] of the grouped pairs; experts with SiLU gates, without biases or dropout.

    The backward pass sets the gradients of the leaves itself. As inputs, each would cost the host as much time as a
    small product. The anchor, any leaf, only makes the output need a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: tuple[Joined, Joined],
        scale: float,
        groups: Groups,
        stacks: Mapping[str, Tensor],
        leaves: list[Tensor],
        norms: Tensor | None,
        x: Tensor,
        weights: Tensor,
        anchor: Tensor | None,
    ) -> Tensor:
        up, down = base
        lora = _Lora(stacks, leaves, scale, x.dtype)
        w = weights[groups.pair].to(x.dtype)
        hidden = x.shape[1]
        inputs = x.new_empty(groups.size, hidden + lora.room)
        rows.gather(x, groups.token, inputs[:, :hidden])
        low_up = low_down = None
        if lora.room:
            low_up = grouped_mm(inputs[:, :hidden], lora.scaled_a("up").transpose(1, 2), offs=groups.ends)
            inputs[:, hidden:] = low_up
        u = grouped_mm(inputs, up.forward(lora.b("up")), offs=groups.ends)
        del inputs
        inner = u.shape[1] // 2
        a = x.new_empty(groups.size, inner + lora.room)
        rows.silu_gate(u, w, a[:, :inner])
        if norms is not None:
            norms[groups.pair] = torch.linalg.vector_norm(a[:, :inner], dim=1, dtype=torch.float32)
        if lora.room:
            low_down = grouped_mm(a[:, :inner], lora.scaled_a("down").transpose(1, 2), offs=groups.ends)
            a[:, inner:] = low_down
        ctx.base, ctx.groups, ctx.lora, ctx.weights_like = base, groups, lora, (weights.shape, weights.dtype)
        ctx.save_for_backward(x, w, u, low_up, low_down)
        return rows.sum_pairs(grouped_mm(a, down.forward(lora.b("down")), offs=groups.ends), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (up, down), groups, lora = ctx.base, ctx.groups, ctx.lora
        x, w, u, low_up, low_down = ctx.saved_tensors
        hidden, inner = x.shape[1], u.shape[1] // 2
        outputs = x.new_empty(groups.size, hidden + lora.room)
        rows.gather(grads[0].contiguous(), groups.token, outputs[:, :hidden])
        d_low = None
        if lora.room:
            d_low = grouped_mm(outputs[:, :hidden], lora.scaled_b("down"), offs=groups.ends)
            outputs[:, hidden:] = d_low
            lora.put_b("down", low_down, outputs[:, :hidden], groups)
        d_a = grouped_mm(outputs, down.backward(lora.a("down")), offs=groups.ends)
        a, d_u = torch.empty_like(d_a), x.new_empty(groups.size, 2 * inner + lora.room)
        d_pairs = rows.silu_gate_backward(u, w, d_a, a, d_u[:, : 2 * inner])
        del d_a
        d_weights = None
        if ctx.needs_input_grad[7]:
            shape, dtype = ctx.weights_like
            d_weights = torch.zeros(shape, dtype=dtype, device=x.device)
            d_weights[groups.pair] = d_pairs.to(dtype)
        if lora.room:
            lora.put_a("down", d_low, a, groups)
            d_low = grouped_mm(d_u[:, : 2 * inner], lora.scaled_b("up"), offs=groups.ends)
            d_u[:, 2 * inner :] = d_low
            lora.put_b("up", low_up, d_u[:, : 2 * inner], groups)
            if lora.wants("up_a"):
                rows.gather(x, groups.token, outputs[:, :hidden])  # what was there is no longer needed
                lora.put_a("up", d_low, outputs[:, :hidden], groups)
        del outputs, a
        d_x = None
        if ctx.needs_input_grad[6]:
            d_x = rows.sum_pairs(grouped_mm(d_u, up.backward(lora.a("up")), offs=groups.ends), groups)
        return None, None, None, None, None, None, d_x, d_weights, None


class _Lora:
    """LoRA's stacks as the products need them, and where their gradients go; `room` is 0 without LoRA.

    Args:
        leaves: group by group, its row of each stack.
    """

    def __init__(self, stacks: Mapping[str, Tensor], leaves: list[Tensor], scale: float, dtype: torch.dtype) -> None:
        self._stacks, self._leaves, self._scale, self._dtype = stacks, leaves, scale, dtype
        self._names = list(stacks)
        self._rank = stacks["up_a"].shape[1] if stacks else 0
        self.room = room_for(self._rank)

    def a(self, side: str) -> Tensor | None:
        """A [E, R, in]; None without LoRA."""
        return self._stacks.get(f"{side}_a")

    def b(self, side: str) -> Tensor | None:
        """B [E, out, R]; None without LoRA."""
        return self._stacks.get(f"{side}_b")

    def scaled_a(self, side: str) -> Tensor:
        """c A [E, R, in]."""
        return scaled(self._stacks[f"{side}_a"], self._scale, self._dtype)

    def scaled_b(self, side: str) -> Tensor:
        """c B [E, out, R], stored by rank, as the products need it."""
        return scaled(self._stacks[f"{side}_b"].transpose(1, 2), self._scale, self._dtype).transpose(1, 2)

    def wants(self, name: str) -> bool:
        """Whether the leaves of `name` are trained."""
        return any(leaf.requires_grad for leaf in self._leaves_of(name)[:1])

    def put_b(self, side: str, low: Tensor, grad: Tensor, groups: Groups) -> None:
        """Gradients of B from low = c x A' [S, R] and the gradient of the output [S, out], stored as B is."""
        if self.wants(f"{side}_b"):
            self._put(f"{side}_b", self._outer(low, grad, groups, f"{side}_b").transpose(1, 2), groups)

    def put_a(self, side: str, low: Tensor, inputs: Tensor, groups: Groups) -> None:
        """Gradients of A from low = c g B [S, R] and the inputs [S, in]."""
        if self.wants(f"{side}_a"):
            self._put(f"{side}_a", self._outer(low, inputs, groups, f"{side}_a"), groups)

    def _leaves_of(self, name: str) -> list[Tensor]:
        return self._leaves[self._names.index(name) :: len(self._names)]

    def _put(self, name: str, grads: Tensor, groups: Groups) -> None:
        """Add grads [E, ...] to those of the leaves, which are views of one tensor if they had none."""
        every = grads.unbind(0)
        for leaf, (expert, _, _) in zip(self._leaves_of(name), groups.spans, strict=True):
            if leaf.grad is None:
                leaf.grad = every[expert]
            else:
                leaf.grad.add_(every[expert])

    def _outer(self, low: Tensor, wide: Tensor, groups: Groups, name: str) -> Tensor:
        """low' @ wide of each group: [E, R, columns of wide]; what experts without rows have is undefined."""
        return grouped_mm(low.t(), wide, offs=groups.ends)[:, : self._rank].to(self._stacks[name].dtype)

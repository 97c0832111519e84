"""The gate (activation) between the up and the down projection of an expert, and its gradient.

a = gate(u) * w        u [S, U], w [S, 1] the routing weights -> a [S, I]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """The activation of the experts of a layer."""

    function: Callable[[Tensor], Tensor]
    """u [S, U] -> [S, I]: the activation, times the ungated half if the family has one."""
    silu: bool = False
    """True for silu(first half) * second half; its gradient is written out here, which is faster."""

    def __call__(self, u: Tensor, w: Tensor) -> Tensor:
        """gate(u) * w [S, I], in new memory."""
        if not self.silu:
            a = self.function(u)
            return a * w if a is u else a.mul_(w)  # an identity returns u itself, which the backward pass needs
        gate, up = u.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up).mul_(w)

    def again(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """gate(u) [S, I] for the backward pass; for silu also memory for the gradient [S, U], first half silu(gate)."""
        if not self.silu:
            a = self.function(u)
            return a.clone() if a is u else a, None
        gate, up = u.chunk(2, dim=-1)
        d_u = torch.empty_like(u)
        silu = torch.ops.aten.silu.out(gate, out=d_u.chunk(2, dim=-1)[0])
        return silu * up, d_u

    def backward(
        self, u: Tensor, w: Tensor, a: Tensor, d_a: Tensor, d_u: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of w [S] and u [S, U], given d_a [S, I], that of the weighted and masked a. Overwrites a and d_a.

        Args:
            a, d_u: from `again`; a is already multiplied with the mask.
            mask: [S, I], the dropout mask of gate(u).
        """
        d_w = a.mul_(d_a).sum(1)  # torch adds up in float32 in any precision
        d_a *= w
        if mask is not None:
            d_a *= mask
        if d_u is None:
            with torch.enable_grad():
                u = u.detach().requires_grad_()
                return d_w, torch.autograd.grad(self.function(u), u, d_a)[0]
        gate, up = u.chunk(2, dim=-1)
        d_gate, d_up = d_u.chunk(2, dim=-1)
        torch.mul(d_a, d_gate, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_a.mul_(up), gate, grad_input=d_gate)
        return d_w, d_u

"""Use our experts forward in blocks that do not call transformers' experts interface.

Most blocks call `experts(hidden, top_k_index, top_k_weights)`, and the interface lets a library replace that forward.
In the others, the experts or their block get a new forward on the instance, which calls the same code.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hfedmoe.moe.anatomy import MoELayer
from hfedmoe.moe.families import Dispatch


class Experts(Protocol):
    """Computes the experts of a layer (`state.ExpertState`)."""

    layer: MoELayer

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], index and weights [T, K] -> [T, H]: `observe`, then `compute`."""
        ...

    def observe(self, index: Tensor, weights: Tensor) -> None:
        """Report the routing, before the experts run."""
        ...

    def compute(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run the experts without `observe`."""
        ...


def redirect(way: Dispatch, state: Experts) -> None:
    """Let the original block of a layer compute with `state`."""
    layer = state.layer
    if way == "weights_on_input":
        _set_forward(layer.block, _weights_on_input(state))
    else:
        _set_forward(layer.experts, _one_hot(state) if way == "one_hot" else _identity(state))


def keep_eager(block: Any) -> None:
    """Exclude a MoE block from torch.compile; the code around it is still compiled.

    Routers are masked and watched by hooks and modes, which compiled code would skip. Also, the number of tokens per
    expert changes from batch to batch.
    """
    _set_forward(block, torch.compiler.disable(block.forward))


def _set_forward(module: Any, forward: Callable[..., Any]) -> None:
    object.__setattr__(module, "forward", forward)


def _one_hot(state: Experts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Switch Transformers: one-hot dispatch [T, 1, E], all zero for tokens over capacity."""

    def forward(hidden: Tensor, dispatch: Tensor, weights: Tensor) -> Tensor:
        index = dispatch.argmax(dim=-1)
        index = index.masked_fill(dispatch.sum(dim=-1) == 0, state.layer.num_experts)
        return state(hidden, index, weights)

    return forward


def _identity(state: Experts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """LongCat: indices from E on mean "the token itself", weighted like the output of an expert."""

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        number = state.layer.num_experts
        own = (weights * (index >= number)).sum(-1, keepdim=True)
        return state(hidden, index.clamp(max=number), weights) + hidden * own.to(hidden.dtype)

    return forward


def _weights_on_input(state: Experts) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Llama-4: the scores scale the experts' input, not the output; only chosen experts run (others would get 0)."""
    block: Any = state.layer.block
    top_k = state.layer.top_k

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = block.router(flat)
        weights, index = scores.topk(top_k, dim=-1)
        # Each expert's output has a gate of 1, so that its gradient can be watched.
        gate = torch.ones_like(weights).requires_grad_(weights.requires_grad)
        state.observe(index, gate)
        tokens = (flat[:, None] * weights[..., None].to(flat.dtype)).reshape(-1, flat.shape[1])
        routed = state.compute(tokens, index.reshape(-1, 1), gate.reshape(-1, 1))
        out = block.shared_expert(flat)
        return out + routed.view(-1, top_k, flat.shape[1]).sum(1).to(out.dtype), logits

    return forward

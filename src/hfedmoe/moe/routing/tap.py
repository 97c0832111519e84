"""Read and mask a router's logits at the output of its linear layer, for any family."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hfedmoe.method.importance import routing_probabilities
from hfedmoe.moe.anatomy import MoELayer

_LINEAR = {torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_SIGMOID = {torch.sigmoid, Tensor.sigmoid, torch.nn.functional.sigmoid, torch.special.expit}
_SOFTPLUS = {torch.nn.functional.softplus}


class LogitTap(TorchFunctionMode):
    """Active in a router's forward: stores the raw logits, masks absent experts, and detects the kind of score."""

    def __init__(self, layer: MoELayer, absent: Tensor | None, with_gradient: bool = False) -> None:
        super().__init__()
        self._with_gradient = with_gradient
        self._num_logits, self._num_experts, self._top_k = layer.num_logits, layer.num_experts, layer.top_k
        self._absent = None if absent is None else widened(absent, self._num_logits)
        self.live: Tensor | None = None
        """As `logits`, with gradient; only if it was asked for."""
        self.logits: Tensor | None = None
        """[T, E]: logits of the experts, before masking."""
        self.kind = "softmax"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.logits is None:
            if func in _LINEAR and out.shape[-1] == self._num_logits:
                logits = out.reshape(-1, self._num_logits)[:, : self._num_experts]
                self.logits, self.live = logits.detach(), logits if self._with_gradient else None
                if self._absent is not None:
                    out = out.masked_fill(self._absent.to(out.device), float("-inf"))
        elif func in _SIGMOID and out.shape[-1] in (self._num_logits, self._num_experts, self._top_k):
            self.kind = "sigmoid"
        elif func in _SOFTPLUS and out.shape[-1] == self._num_logits:
            self.kind = "sqrtsoftplus"
        return out


def probabilities_of(logits: Tensor, kind: str) -> Tensor:
    """`routing_probabilities`, with one more kind: the square root of softplus, normalised (DeepSeek-V4)."""
    if kind == "sqrtsoftplus":
        return routing_probabilities(0.5 * torch.nn.functional.softplus(logits.float()).log(), "softmax")
    return routing_probabilities(logits, kind)


def widened(flags: Tensor, width: int) -> Tensor:
    """bool [E] -> [width], padded with False: what a router scores in addition to experts is never absent."""
    return torch.nn.functional.pad(flags, (0, width - flags.shape[0]))

"""Routing by document: while a base is trained, all tokens of one text share a few experts.

For each text and layer the pool is the m experts with the largest mean routing probability over the text's tokens, less
a bias that grows with the number of texts that an expert serves: without it a few experts would serve all texts. The
text's tokens choose among its pool only. Two terms of the loss belong to it, each per layer over the whole batch:

    balance = E * sum_e f_e * P_e       f: share of the routed pairs, P: mean probability before the pool
    outside = mean probability that tokens give to experts outside their pool

The first is the usual load balance; because it is taken over all texts of a batch, a text may use few experts while the
batch uses all. The second makes the stock router, which knows no pools, choose as the pool does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Pools:
    """Hooks on the routers of an OLMoE model.

    Args:
        model: a transformers OLMoE model; its routers return (logits [T, E], weights [T, K], indices [T, K]).
        size: m, experts per text and layer.
        rate: how far a batch moves the bias, in log probability.
    """

    def __init__(self, model: Any, size: int, rate: float = 0.05) -> None:
        self.size, self.rate, self.top_k = size, rate, int(model.config.num_experts_per_tok)
        self._routers = [layer.mlp.gate for layer in model.model.layers]
        self.bias = torch.zeros(len(self._routers), model.config.num_experts)
        """[L, E], subtracted from the log probabilities when pools are chosen."""
        self._keep: Tensor | None = None
        self._terms: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def routing(self, mask: Tensor) -> Iterator[None]:
        """Route by pool in the block. `mask` [B, S]: True for real tokens."""
        self._keep, self._terms = mask, []
        handles = [
            router.register_forward_hook(partial(self._restrict, layer)) for layer, router in enumerate(self._routers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def terms(self) -> tuple[Tensor, Tensor]:
        """The two terms of the last pass, each the mean over the layers."""
        balance, outside = zip(*self._terms, strict=True)
        return torch.stack(balance).mean(), torch.stack(outside).mean()

    def _restrict(self, layer: int, router: Any, args: Any, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert self._keep is not None
        logits = outputs[0]
        probabilities = logits.float().softmax(-1)
        keep = self._keep.float()
        by_text = probabilities.view(*keep.shape, -1) * keep[..., None]
        mean_of_text = (by_text.detach().sum(1) / keep.sum(1, keepdim=True)).clamp_min(1e-9)
        chosen = (mean_of_text.log() - self.bias[layer]).topk(self.size, dim=-1).indices  # [B, m]
        pool = torch.zeros(len(chosen), logits.shape[-1], dtype=torch.bool, device=logits.device).scatter_(
            1, chosen, True
        )
        load = pool.float().mean(0)
        self.bias[layer] += self.rate * (load / load.mean() - 1).clamp(-1, 1)
        allowed = pool[:, None].expand(*keep.shape, -1).reshape(-1, logits.shape[-1])
        within = logits.float().masked_fill(~allowed, float("-inf")).softmax(-1)
        weights, index = within.topk(self.top_k, dim=-1)
        real = keep.reshape(-1)
        counts = torch.zeros_like(probabilities).scatter_(1, index, 1.0) * real[:, None]
        share = counts.sum(0) / counts.sum()
        mean = (probabilities * real[:, None]).sum(0) / real.sum()
        outside = ((probabilities * ~allowed).sum(-1) * real).sum() / real.sum()
        self._terms.append((len(mean) * (share * mean).sum(), outside))
        return logits, weights.to(outputs[1].dtype), index

"""Routers: masked to the resident experts for decisions, unmasked for statistics.

The stock router of each family keeps its own rules (softmax or sigmoid, groups, correction biases, renormalised top-k).
Absent experts are masked where the logits arise, before any of these rules, by watching the one linear map inside the
router; so weights renormalise as the family does. The unmasked logits of the same pass give the statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hfedmoe.method.importance import routing_probabilities, sample_mean
from hfedmoe.method.scores import Evidence
from hfedmoe.moe.anatomy import MoELayer
from hfedmoe.moe.experts import ExpertState

_LINEAR = {torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_SIGMOID = {torch.sigmoid, Tensor.sigmoid, torch.nn.functional.sigmoid, torch.special.expit}
_ABSENT_BIAS = -1e4
"""Added to the correction bias of absent experts; finite, so that a group with one resident beats an empty one."""

Choose = Callable[[int, Evidence, Tensor], Tensor]
"""(layer, evidence so far, hit bool [E]) -> experts bool [E] that build a graph for this batch."""


@dataclass
class Batch:
    """Which tokens of a batch count, for decoder (or only) and encoder layers."""

    mask: Tensor
    """[B, S]: 1 for tokens, 0 for padding."""
    encoder_mask: Tensor | None = None
    """[B, S'] of the encoder, in encoder-decoder models."""

    def of(self, layer: MoELayer) -> Tensor:
        return self.mask if layer.in_decoder or self.encoder_mask is None else self.encoder_mask


class _LogitTap(TorchFunctionMode):
    """Inside a router's forward: notes its raw logits, masks absent experts in them, and sees how it scores."""

    def __init__(self, num_experts: int, absent: Tensor | None) -> None:
        super().__init__()
        self.num_experts, self.absent = num_experts, absent
        self.logits: Tensor | None = None
        self.kind = "softmax"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.logits is None:
            if func in _LINEAR and out.shape[-1] == self.num_experts:
                self.logits = out.detach().reshape(-1, self.num_experts)
                if self.absent is not None:
                    out = out.masked_fill(self.absent.to(out.device), float("-inf"))
        elif func in _SIGMOID and out.shape[-1] == self.num_experts:
            self.kind = "sigmoid"
        return out


class LayerRouting:
    """Hooks on one layer's block and router; gathers what a watched batch shows about the layer's experts."""

    def __init__(self, state: ExpertState) -> None:
        self.state, self.layer = state, state.layer
        self.batch: Batch | None = None
        self.choose: Choose | None = None
        self.token_level = False
        self.evidence: Evidence | None = None
        self.tokens: Tensor | None = None
        """float32 [E]: tokens of the watched batch that each expert really processed."""
        self.hit: Tensor | None = None
        self._measure: str | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self._tap: _LogitTap | None = None
        self._biases = _correction_biases(self.layer)
        router, block = self.layer.router, self.layer.block
        router.register_forward_pre_hook(self._enter)
        router.register_forward_hook(self._leave, always_call=True)
        block.register_forward_pre_hook(self._mask_biases)
        block.register_forward_hook(self._restore_biases, always_call=True)
        state.observer = self._observe

    def watch(self, batch: Batch | None, measure: str | None = None) -> None:
        """Gather evidence from the next forward (and backward) pass; None stops watching.

        Args:
            measure: "activation" or "taylor" where the score needs it.
        """
        self.batch, self.evidence, self.tokens, self.hit = batch, None, None, None
        self.state.trainable = None
        self._measure = measure if batch is not None else None
        self.state.norms = self._activation if self._measure == "activation" else None

    def _enter(self, module: nn.Module, args: Any) -> Any:
        resident = self.state.resident
        self._tap = _LogitTap(self.layer.num_experts, None if resident is None else ~resident)
        self._tap.__enter__()
        # A trained router is float32 in a 16-bit model too, and its weights are cast by the experts forward.
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._tap is not None:
            self._tap.__exit__(None, None, None)

    def _mask_biases(self, module: nn.Module, args: Any) -> None:
        resident = self.state.resident
        if resident is not None:
            for owner, name, bias in self._biases:
                owner._buffers[name] = bias + _ABSENT_BIAS * (~resident).to(bias).view_as(bias)

    def _restore_biases(self, module: nn.Module, args: Any, output: Any) -> None:
        for owner, name, bias in self._biases:
            owner._buffers[name] = bias

    def _observe(self, index: Tensor, weights: Tensor) -> None:
        if self.batch is None or self.evidence is not None:  # recomputed under gradient checkpointing: once is enough
            return
        tap = self._tap
        if tap is None or tap.logits is None:
            raise RuntimeError(f"layer {self.layer.name}: the router's logits were not seen")
        num_experts = self.layer.num_experts
        mask = self.batch.of(self.layer).to(index.device)
        keep = mask.reshape(-1).bool()
        if keep.shape[0] != index.shape[0]:
            raise RuntimeError(
                f"layer {self.layer.name}: {index.shape[0]} tokens routed, but the mask has {keep.shape[0]}"
            )
        probabilities = routing_probabilities(tap.logits, tap.kind)
        if self.token_level:
            g = probabilities[keep]
        else:
            sample = torch.arange(mask.shape[0], device=keep.device).repeat_interleave(mask.shape[1])
            g = sample_mean(probabilities, sample, mask.shape[0], keep)
        used = _count(index, keep, num_experts)
        if self.state.resident is None:
            demanded = used
        else:
            demanded = _count(probabilities.topk(index.shape[1], dim=-1).indices, keep, num_experts)
            used = used * self.state.resident
        self.evidence = Evidence(g=g, routed=demanded)
        self.tokens, self.hit, self._index = used, used > 0, index
        if self._measure == "taylor":
            self.evidence.taylor = torch.full_like(used, float("nan"))  # until the backward pass has been there
            if weights.requires_grad:
                self._watch_gradient(weights, keep)
        if self.choose is not None:
            self.state.trainable = self.choose(self.layer.index, self.evidence, self.hit)

    def _watch_gradient(self, weights: Tensor, keep: Tensor) -> None:
        evidence, index, present, values = self.evidence, self._index, self.resident(), weights.detach().float()

        def on_gradient(grad: Tensor) -> None:
            assert evidence is not None
            evidence.taylor = _per_expert(-(values * grad.float()) * keep[:, None], index, present)

        weights.register_hook(on_gradient)

    def _activation(self, norms: Tensor) -> None:
        assert self.evidence is not None
        assert self.batch is not None
        keep = self.batch.of(self.layer).to(norms.device).reshape(-1, 1)
        ran = self.resident() if self.state.trainable is None else self.resident() & self.state.trainable
        self.evidence.activation = _per_expert(norms * keep, self._index, ran)

    def resident(self) -> Tensor:
        """bool [E]: experts that may be used."""
        resident = self.state.resident
        if resident is None:
            return torch.ones(self.layer.num_experts, dtype=torch.bool, device=self._index.device)
        return resident


def _count(index: Tensor, keep: Tensor, num_experts: int) -> Tensor:
    """float32 [E]: kept tokens per expert; indices outside [0, E) mean "no expert"."""
    return torch.bincount(index[keep].reshape(-1).clamp(max=num_experts), minlength=num_experts + 1)[
        :num_experts
    ].float()


def _per_expert(values: Tensor, index: Tensor, present: Tensor) -> Tensor:
    """Add up `values` [T, K] per expert; NaN for experts that are not present, so that nothing is learned of them."""
    num_experts = present.shape[0]
    total = values.new_zeros(num_experts + 1).index_add_(
        0, index.reshape(-1).clamp(max=num_experts), values.reshape(-1)
    )
    return total[:num_experts].masked_fill(~present, float("nan"))


def _correction_biases(layer: MoELayer) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that shift the choice of experts without passing through the logits (DeepSeek-V3 and its kin)."""
    return [
        (owner, name, buffer)
        for owner in layer.block.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and "correction_bias" in name and buffer.numel() == layer.num_experts
    ]

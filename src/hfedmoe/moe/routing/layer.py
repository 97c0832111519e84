"""Routers: masked to the resident experts for decisions, unmasked for statistics.

The original router of each family keeps its own rules (softmax or sigmoid, groups, correction biases, renormalised
top-k). Absent experts are masked in the output of the router's one linear layer, before these rules, so weights are
renormalised as in the family. The unmasked logits of the same pass give the statistics.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfedmoe.method.importance import sample_mean
from hfedmoe.method.scores import Evidence
from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.routing.tap import LogitTap, probabilities_of, widened
from hfedmoe.moe.routing.tokens import TokenMasks

_ABSENT_BIAS = -1e4
"""Added to the correction bias of absent experts; finite, so that a group with one resident beats one with none."""

Choose = Callable[[int, Evidence, Tensor], Tensor]
"""(layer, evidence so far, hit bool [E]) -> experts bool [E] that build a graph for this batch."""


class LayerRouting:
    """Hooks on one layer's block and router; collects evidence about the layer's experts from a watched batch."""

    def __init__(self, state: ExpertState) -> None:
        self.state, self.layer = state, state.layer
        self.batch: TokenMasks | None = None
        self.choose: Choose | None = None
        self.token_level = False
        self.with_gradient = False
        """Whether the logits of a pass are kept with their gradient, for `batch_mean`."""
        self.evidence: Evidence | None = None
        self.tokens: Tensor | None = None
        """float32 [E]: number of tokens of the watched batch that each expert processed."""
        self.hit: Tensor | None = None
        self._measures: frozenset[str | None] = frozenset()
        self._index = torch.empty(0, dtype=torch.int64)
        self._tap: LogitTap | None = None
        self._wanted: Tensor | None = None
        """int64 [T, K]: the router's choice among all experts for the watched batch; None if it gives no indices."""
        self._biases = self.layer.correction_biases()
        self._dtype = torch.float32
        """The precision of the block, which may differ from the router's."""
        router, block = self.layer.router, self.layer.block
        router.register_forward_pre_hook(self._enter)
        router.register_forward_hook(self._leave, always_call=True)
        block.register_forward_pre_hook(torch.compiler.disable(self._mask_biases))
        block.register_forward_hook(torch.compiler.disable(self._restore_biases), always_call=True)
        state.observer = self._observe

    @property
    def scoring(self) -> str:
        """How the router turned logits into scores in its last pass: "softmax", "sigmoid" or "sqrtsoftplus"."""
        return "softmax" if self._tap is None else self._tap.kind

    def watch(self, batch: TokenMasks | None, *measures: str | None) -> None:
        """Collect evidence from the next forward (and backward) pass; None stops watching.

        Args:
            measures: of "activation", "taylor" and "ghost" what the score needs; None: nothing.
        """
        self.batch, self.evidence, self.tokens, self.hit = batch, None, None, None
        self.state.trainable = None
        self.state.counted = None if batch is None else batch.of(self.layer).keep.reshape(-1)
        self._measures = frozenset(measures if batch is not None else ())
        self.state.norms = self._activation if "activation" in self._measures else None
        self.state.gradients = None  # set when the routing of the pass is known

    def _enter(self, module: nn.Module, args: Any) -> Any:
        # A trained router is float32 also in a 16-bit model; the experts forward casts the weights that it returns.
        dtype = next(module.parameters()).dtype
        self._dtype = args[0].dtype
        args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        resident = self.state.routable
        if resident is not None and self.batch is not None and self.evidence is None:
            self._wanted = self._unmasked_choice(module, args)
        self._tap = LogitTap(self.layer, None if resident is None else ~resident, self.with_gradient)
        self._tap.__enter__()
        return args

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._tap is not None:
            self._tap.__exit__(None, None, None)
        if isinstance(output, tuple) and len(output) > 3:
            # Outputs after logits, weights and indices go to other modules, for example weights of shared experts.
            return (*output[:3], *(out.to(self._dtype) if isinstance(out, Tensor) else out for out in output[3:]))
        return None

    def _unmasked_choice(self, router: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
        """The experts [T, K] that the router would choose among all, by its own rules; None if it gives no indices."""
        masks = {(owner, name): owner.__dict__.pop(name, None) for owner, name in self._biases}
        plain = [self._unmask(a) if isinstance(a, Tensor) else a for a in args]
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(self._device)):
            outputs = router.forward(*plain)
        for (owner, name), masked in masks.items():
            if masked is not None:
                owner.__dict__[name] = masked
        return _indices(outputs, self.layer.top_k)

    def _unmask(self, argument: Tensor) -> Tensor:
        """A router's argument; if it is the masked correction bias of the block, the unmasked one."""
        for owner, name in self._biases:
            bias = getattr(owner, name)
            if owner is self.layer.block and argument.shape == bias.shape:
                return bias.to(argument.dtype)
        return argument

    @property
    def _device(self) -> torch.device:
        return next(self.layer.router.parameters()).device

    def _mask_biases(self, module: nn.Module, args: Any) -> None:
        resident = self.state.routable
        if resident is not None:
            for owner, name in self._biases:
                bias = getattr(owner, name)
                absent = widened(~resident, bias.numel()).to(bias).view_as(bias)
                # Python finds this before the parameter or buffer of that name, which does not change.
                owner.__dict__[name] = bias.detach() + _ABSENT_BIAS * absent

    def _restore_biases(self, module: nn.Module, args: Any, output: Any) -> None:
        for owner, name in self._biases:
            owner.__dict__.pop(name, None)

    def _observe(self, index: Tensor, weights: Tensor) -> None:
        if self.batch is None or self.evidence is not None:  # recomputed under gradient checkpointing: once is enough
            return
        tap = self._tap
        if tap is None or tap.logits is None:
            raise RuntimeError(f"layer {self.layer.name}: the router's logits were not seen")
        num_experts = self.layer.num_experts
        counted = self.batch.of(self.layer)
        keep = counted.keep.reshape(-1)
        if keep.shape[0] != index.shape[0]:
            raise RuntimeError(
                f"layer {self.layer.name}: {index.shape[0]} tokens routed, but the mask has {keep.shape[0]}"
            )
        probabilities = self._shares(index) if self.layer.fixed_routing else probabilities_of(tap.logits, tap.kind)
        if self.token_level:
            g = probabilities[counted.kept]
        else:
            g = sample_mean(probabilities, counted.keep, counted.observed)
        used = _count(index, keep, num_experts)
        if self.state.routable is None:
            demanded = used
        else:
            wanted = probabilities.topk(index.shape[1], dim=-1).indices if self._wanted is None else self._wanted
            demanded = _count(wanted, keep, num_experts)
        if self.state.resident is not None:
            used = used * self.state.resident
        self.evidence = Evidence(g=g, routed=demanded, processed=used)
        self.tokens, self.hit, self._index = used, used > 0, index
        if "taylor" in self._measures:
            self.evidence.taylor = torch.full_like(used, float("nan"))  # until the backward pass
            if weights.requires_grad:
                self._watch_gradient(weights, keep)
        if self.choose is not None:
            self.state.trainable = self.choose(self.layer.index, self.evidence, self.hit)
        if "ghost" in self._measures:
            self.evidence.ghost = torch.full_like(used, float("nan"))  # until the backward pass
            ran = self.resident() if self.state.off_budget == "frozen" else self._trained()
            self.state.gradients = partial(_on_gradients, self.evidence, index, keep, ran)

    def _shares(self, index: Tensor) -> Tensor:
        """[T, E]: an equal share for each expert of a token."""
        shares = torch.zeros(index.shape[0], self.layer.num_experts, device=index.device)
        # Added up: a table may name an expert twice.
        return shares.scatter_add_(1, index, torch.full(index.shape, 1 / index.shape[1], device=index.device))

    def _watch_gradient(self, weights: Tensor, keep: Tensor) -> None:
        evidence, index, present, values = self.evidence, self._index, self.resident(), weights.detach().float()

        def on_gradient(grad: Tensor) -> None:
            assert evidence is not None
            evidence.taylor = _per_expert(-(values * grad.float()) * keep[:, None], index, present)

        weights.register_hook(on_gradient)

    def _activation(self, norms: Tensor) -> None:
        assert self.evidence is not None
        assert self.batch is not None
        norms = norms.view(self._index.shape)  # with weights on the input, every pair is its own token
        norms = norms * self.batch.of(self.layer).keep.reshape(-1, 1)
        self.evidence.activation = _per_expert(norms, self._index, self._trained())
        self.evidence.squares = _per_expert(norms.square(), self._index, self._trained())

    def batch_mean(self) -> Tensor:
        """[E], with gradient: the mean routing probability of the watched batch's real tokens.

        Raises:
            RuntimeError: no batch was watched `with_gradient`.
        """
        if self._tap is None or self._tap.live is None or self.batch is None:
            raise RuntimeError(f"layer {self.layer.name}: no logits of a watched batch")
        keep = self.batch.of(self.layer).keep.reshape(-1)
        return probabilities_of(self._tap.live, self._tap.kind)[keep].mean(0)

    def resident(self) -> Tensor:
        """bool [E]: experts that may be used."""
        resident = self.state.resident
        if resident is None:
            return torch.ones(self.layer.num_experts, dtype=torch.bool, device=self._index.device)
        return resident

    def _trained(self) -> Tensor:
        """bool [E]: resident experts that build a graph for the watched batch."""
        return self.resident() if self.state.trainable is None else self.resident() & self.state.trainable


def _on_gradients(evidence: Evidence, index: Tensor, keep: Tensor, ran: Tensor, norms: Tensor) -> None:
    """In the backward pass: add up the squared norms of the pairs' gradients."""
    evidence.ghost = _per_expert((norms.view(index.shape) * keep[:, None]).square(), index, ran)


def _count(index: Tensor, keep: Tensor, num_experts: int) -> Tensor:
    """float32 [E]: kept tokens per expert; indices outside [0, E) mean "no expert"."""
    kept = keep[:, None].expand_as(index).reshape(-1).float()  # whole numbers: sums are exact in any order
    counts = kept.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, index.reshape(-1).clamp(max=num_experts), kept)[:num_experts]


def _per_expert(values: Tensor, index: Tensor, present: Tensor) -> Tensor:
    """Add up `values` [T, K] per expert; NaN for experts that are not present: they count as not observed."""
    num_experts = present.shape[0]
    # First per token: if the experts of a token differ, no two values are added to the same place in random order.
    values = values.masked_fill(index >= num_experts, 0.0)
    spread = values.new_zeros(len(index), num_experts + 1).scatter_add_(1, index.clamp(max=num_experts), values)
    return spread[:, :num_experts].sum(0).masked_fill(~present, float("nan"))


def _indices(outputs: Any, top_k: int) -> Tensor | None:
    """The output of a router that holds the chosen experts; None if there is none."""
    for out in outputs if isinstance(outputs, tuple) else (outputs,):
        if isinstance(out, Tensor) and not out.is_floating_point() and out.dim() == 2 and out.shape[-1] == top_k:
            return out
    return None


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

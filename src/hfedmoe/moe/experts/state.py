"""Our experts forward, registered with transformers' experts interface, and its state for each layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hfedmoe.moe.anatomy import MoELayer
from hfedmoe.moe.experts.dispatch import redirect
from hfedmoe.moe.experts.groups import Groups, group_pairs
from hfedmoe.moe.experts.kernel import ExpertMath, experts_forward
from hfedmoe.moe.experts.layouts import Held, layout_of
from hfedmoe.moe.experts.merged import Merged, Mixture, Originals, merged_of
from hfedmoe.moe.experts.own import OwnExperts
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.experts.trained import TrainedExperts

IMPLEMENTATION = "hfedmoe"
"""Name under which the forward is registered: `model.set_experts_implementation("hfedmoe")`."""
STATE = "_hfedmoe"

Observer = Callable[[Tensor, Tensor], None]
"""Called with (indices [T, K], weights [T, K]) of the routed tokens before the experts run."""


class ExpertState:
    """One layer's experts on this device: which are here, which are trained, and how they compute."""

    def __init__(self, layer: MoELayer, store: ExpertStore | None = None) -> None:
        self.layer = layer
        self.store = store
        """Holds the base tensors if they are not parameters of the model."""
        self.layout = layout_of(layer)
        self.grouping: Callable[..., Groups] = group_pairs
        self.trained: TrainedExperts | None = None
        self.begin: Callable[[Tensor], TrainedExperts] | None = None
        """Makes new trained tensors for the experts with these indices; set if a store reads experts when needed."""
        self.resident: Tensor | None = None
        """bool [E]: experts that may be used; None means all."""
        self.local: Tensor | None = None
        """int64 [E + 1]: position of each expert in the (carved) stacks; None if experts keep their own index."""
        self.trainable: Tensor | None = None
        """bool [E]: experts that build a graph for this batch; None means all."""
        self.counted: Tensor | None = None
        """bool [T]: True for real tokens; experts skip padding and do not learn from it. None: all tokens are real."""
        self.most_per_token: int | None = None
        """Experts that work on a token at most; None: all that the router chose."""
        self.merged: Merged | None = None
        """Frozen experts that stand in for those which are not resident; None: tokens only go to residents."""
        self.own: OwnExperts | None = None
        """A client's own experts beside these; None: there are none."""
        self.scale: Tensor | None = None
        """[1], trained: the output of the experts is multiplied by it; None: it is not."""
        self.off_budget = "frozen"
        self.observer: Observer | None = None
        self.norms: Callable[[Tensor], None] | None = None
        """Called with ||w f(x)|| of every pair [T, K], 0 where no expert ran; None: not measured (cheaper)."""
        self.gradients: Callable[[Tensor], None] | None = None
        """Called in the backward pass with the norm of every pair's gradient of the down projection [T, K], 0 where no
        expert ran; None: not measured."""

    @property
    def routable(self) -> Tensor | None:
        """bool [E]: experts that the router may choose; None means all."""
        return self.resident if self.merged is None else None

    @property
    def num_local(self) -> int:
        """Number of experts in memory."""
        if self.store is not None:
            return len(self.store.present[self.layer.index])
        return self.layout.num_local

    @property
    def present(self) -> Tensor:
        """int64 [n]: the experts in the (carved) stacks, in their order."""
        number = self.num_local
        if self.local is None:
            return torch.arange(number)
        return self.local[:-1].argsort()[:number]  # absent experts share the position after the last

    def math(self) -> ExpertMath:
        """How the experts of this layer compute."""
        return self.layout.math(1.0 if self.trained is None else self.trained.scale, self._held)

    @property
    def _held(self) -> Held | None:
        return None if self.store is None else (self.store, self.layer.index)

    def expert_bytes(self) -> int:
        """Bytes of the base tensors of one expert, as they are held."""
        if self.store is not None:
            return self.store.expert_bytes(self.layer.index)
        return sum(p.numel() * p.element_size() for p in self.layer.experts.parameters()) // self.num_local

    def tensors(self) -> dict[str, Tensor]:
        """The base tensors, stacked `[E, ...]`, under the names of kernel.FULL; empty if a store holds them."""
        return self.layout.tensors()

    def originals(self) -> Originals:
        """The base tensors of all experts, wherever they are, to read one by one."""
        if self.store is not None:
            return Originals.of_store(self.store, self.layer.index)
        return Originals.of_stacks(self.tensors())

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Compute with these stacks from now on, as `Layout.set_tensors`."""
        self.layout.set_tensors(tensors)

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts forward: hidden [T, H], index and weights [T, K] -> [T, H]."""
        index, weights = self._limited(index, weights)
        self.observe(index, weights)
        return self.compute(hidden, index, weights)

    def observe(self, index: Tensor, weights: Tensor) -> None:
        """Call the observer of this layer, if there is one, with index and weights [T, K]."""
        if self.observer is not None:
            self.observer(index, weights)

    def compute(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts forward, without the observer."""
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._forward(hidden.to(torch.get_autocast_dtype(device_type)), index, weights).to(hidden.dtype)
        return self._forward(hidden, index, weights)

    def _limited(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Index and weights [T, K] with only the largest weights of each token, which keep their sum."""
        if self.most_per_token is None or self.most_per_token >= index.shape[1]:
            return index, weights
        kept = torch.zeros_like(index, dtype=torch.bool)
        kept.scatter_(1, weights.topk(self.most_per_token, dim=1).indices, True)
        few = weights * kept
        few = few * (weights.sum(1, keepdim=True) / few.sum(1, keepdim=True).clamp_min(1e-12))
        return index.masked_fill(~kept, self.layer.num_experts), few

    def _forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        math = self.math()
        top_k = index.shape[1]
        experts = index.reshape(-1)
        if self.counted is not None:
            padding = ~self.counted.repeat_interleave(len(experts) // len(self.counted))
            experts = experts.masked_fill(padding, self.layer.num_experts)
        trainable, here, every = self.trainable, self.resident, experts
        if self.local is not None:
            experts = self.local[experts]
            trainable = None if trainable is None else trainable[self.present]
            here = None  # absent experts are not in the stacks
        # Group-limited routers may pick absent experts, with weight 0: these must not run in a masked model either.
        chosen = here if trainable is None else trainable if here is None else trainable & here
        flat = weights.reshape(-1)
        groups = self.grouping(experts, self.num_local, top_k, chosen)
        inner = None if self.gradients is None else torch.zeros(index.numel(), device=hidden.device)
        if self.norms is None:
            out = self._grouped(math, hidden, flat, groups, inner)
        else:
            rows = self._pairs(math, hidden, flat, groups, inner) * flat[groups.pair, None].to(hidden.dtype)
            self._report_norms(rows, groups, index.shape)
            out = groups.sum_per_token(rows)
        if trainable is not None and self.off_budget == "frozen":
            rest = self.grouping(experts, self.num_local, top_k, ~trainable if here is None else ~trainable & here)
            if rest.size > 0:
                with torch.no_grad():
                    rows = self._pairs(math, hidden, flat, rest, inner)
                # Experts over the budget still train the gate, but not themselves or the layers below.
                out = out + rest.sum_per_token(rows * flat[rest.pair, None].to(rows.dtype))
        if self.merged is not None:
            out = out + self._merged(self.merged, hidden, every, flat, top_k)
        if self.own is not None and self.own.begun:
            out = self.own.mixed(out, self._own(self.own, hidden, flat, groups), hidden)
        if inner is not None and out.requires_grad:
            self._report_gradients(out, inner.view(index.shape))
        return out if self.scale is None else out * self.scale.to(out.dtype)

    def _merged(self, merged: Merged, hidden: Tensor, experts: Tensor, flat: Tensor, top_k: int) -> Tensor:
        """What merged experts give each token [T, H] in place of absent ones; experts [T * K] as the router chose."""
        groups = self.grouping(merged.place[experts.clamp(0, self.layer.num_experts)], merged.number, top_k)
        return experts_forward(self.layout.math(1.0, (merged.store, 0)), hidden, flat, groups, {}, [])

    def _own(self, own: OwnExperts, hidden: Tensor, flat: Tensor, groups: Groups) -> Tensor:
        """What a client's own experts give each token [T, H]; groups: of the layer's experts."""
        if own.kind == "copy":
            return _computed(self.layout.math(own.trained.scale, self._held), hidden, flat, groups, own.trained)
        base = own.grafted(lambda expert: merged_of([Mixture([expert], [1.0])], expert + 1, self.originals()))
        tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        if self.counted is not None:
            tokens = tokens.masked_fill(~self.counted.repeat_interleave(len(hidden) // len(self.counted)), 1)
        whole = self.grouping(tokens, 1, 1)
        math = self.layout.math(own.trained.scale, (base.store, 0))
        return _computed(math, hidden, hidden.new_ones(len(hidden)), whole, own.trained)

    def _grouped(self, math: ExpertMath, hidden: Tensor, flat: Tensor, groups: Groups, inner: Tensor | None) -> Tensor:
        """The output of every token [T, H]; writes the weighted norms of the inner activations to `inner` [T * K]."""
        return _computed(math, hidden, flat, groups, self.trained, inner)

    def _pairs(self, math: ExpertMath, hidden: Tensor, flat: Tensor, groups: Groups, inner: Tensor | None) -> Tensor:
        """The unweighted output of every pair [S, H]: each pair is treated as its own token; `inner` as `_grouped`."""
        own = torch.arange(groups.size, device=hidden.device)
        alone = Groups(groups.size, own, own, groups.spans, groups.num_experts, groups.ends, own[:, None])
        norms = None if inner is None else inner.new_zeros(groups.size)
        rows = self._grouped(math, hidden[groups.token], hidden.new_ones(groups.size), alone, norms)
        if inner is not None and norms is not None:
            inner[groups.pair] = norms * flat.detach()[groups.pair].abs().float()
        return rows

    def _report_norms(self, rows: Tensor, groups: Groups, shape: torch.Size) -> None:
        norms = torch.zeros(shape.numel(), device=rows.device)
        norms[groups.pair] = rows.detach().float().norm(dim=1)
        assert self.norms is not None
        self.norms(norms.view(shape))

    def _report_gradients(self, out: Tensor, inner: Tensor) -> None:
        """Of a pair, dL/dW_down = w dL/dy a', and its norm is |w| ||dL/dy|| ||a||."""
        report = self.gradients
        assert report is not None
        out.register_hook(
            lambda grad: report(torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)[:, None] * inner)
        )


def _computed(
    math: ExpertMath,
    hidden: Tensor,
    flat: Tensor,
    groups: Groups,
    trained: TrainedExperts | None,
    inner: Tensor | None = None,
) -> Tensor:
    """The output of every token [T, H] with the leaves of `trained` for the groups' experts."""
    if trained is None:
        return experts_forward(math, hidden, flat, groups, {}, [], inner)
    leaves = trained.of([expert for expert, _, _ in groups.spans])
    return experts_forward(math, hidden, flat, groups, trained.stacks, leaves, inner)


def attach(model: Any, layers: list[MoELayer], store: ExpertStore | None = None) -> list[ExpertState]:
    """Let every MoE layer of `model` compute with our experts forward; returns the state of each.

    Raises:
        UnsupportedModelError: the forward does not support the experts of a layer.
    """
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _registered_forward)
    states = []
    for layer in layers:
        state = ExpertState(layer, store)
        state.math()  # raise now, not in the first step
        object.__setattr__(layer.experts, STATE, state)
        if state.layout.dispatch is not None:
            redirect(state.layout.dispatch, state)
        states.append(state)
    if any(state.layout.dispatch is None for state in states):
        model.set_experts_implementation(IMPLEMENTATION)
    return states


def _registered_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return getattr(module, STATE)(hidden, index, weights)

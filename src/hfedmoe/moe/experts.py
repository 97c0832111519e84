"""Our experts forward, registered with transformers' experts interface, and what it knows about each layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hfedmoe.moe.anatomy import MoELayer, UnsupportedModelError, is_stacked
from hfedmoe.moe.base import ListedWeights, SeparateBase, base_of
from hfedmoe.moe.grouping import Groups, group_pairs
from hfedmoe.moe.kernel import ExpertMath, experts_forward
from hfedmoe.moe.trained import TrainedExperts

IMPLEMENTATION = "hfedmoe"
"""Name under which the forward is registered: `model.set_experts_implementation("hfedmoe")`."""
STATE = "_hfedmoe"

Observer = Callable[[Tensor, Tensor], None]
"""Called with (indices [T, K], weights [T, K]) of the routed tokens before the experts run."""


class ExpertState:
    """One layer's experts on this device: which are here, which are trained, and how they compute."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.stacked = is_stacked(layer.experts)
        self.trained: TrainedExperts | None = None
        self.resident: Tensor | None = None
        """bool [E]: experts that may be used; None means all."""
        self.local: Tensor | None = None
        """int64 [E + 1]: place of each expert in the (carved) stacks; None where experts keep their own index."""
        self.trainable: Tensor | None = None
        """bool [E]: experts that build a graph for this batch; None means all."""
        self.off_budget = "frozen"
        self.observer: Observer | None = None
        self.norms: Callable[[Tensor], None] | None = None
        """Called with ||w f(x)|| of every pair [T, K], 0 where no expert ran; None: not measured (cheaper)."""

    @property
    def num_local(self) -> int:
        """Experts that are present in memory."""
        if self.stacked:
            return int(self.layer.experts.down_proj.shape[0])
        return len(self.layer.experts)

    def math(self) -> ExpertMath:
        """How the experts of this layer compute."""
        scale = 1.0 if self.trained is None else self.trained.scale
        experts = self.layer.experts
        return _stacked_math(experts, scale) if self.stacked else _listed_math(experts, scale)

    def tensors(self) -> dict[str, Tensor]:
        """The base tensors, stacked `[E, ...]`, under the names of kernel.FULL."""
        experts = self.layer.experts
        if not self.stacked:
            members = _members(experts)
            up, down = zip(*(_linears(member) for member in members), strict=True)
            return {
                "up": torch.stack([linear.weight.data for linear in up]),
                "down": torch.stack([linear.weight.data for linear in down]),
            }
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        found = {"up": getattr(experts, up_name).data, "down": experts.down_proj.data}
        if experts.has_bias:
            found |= {"up_bias": getattr(experts, f"{up_name}_bias").data, "down_bias": experts.down_proj_bias.data}
        return found

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Compute with these stacks from now on (the other way round of `tensors`); the model shares their memory."""
        experts = self.layer.experts
        if not self.stacked:
            for member, up_row, down_row in zip(_members(experts), tensors["up"], tensors["down"], strict=True):
                for linear, row in zip(_linears(member), (up_row, down_row), strict=True):
                    linear.weight = nn.Parameter(row, requires_grad=False)
            return
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        for name, attribute in (
            ("up", up_name),
            ("down", "down_proj"),
            ("up_bias", f"{up_name}_bias"),
            ("down_bias", "down_proj_bias"),
        ):
            if name in tensors:
                setattr(experts, attribute, nn.Parameter(tensors[name], requires_grad=False))

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts forward: hidden [T, H], index and weights [T, K] -> [T, H]."""
        if self.observer is not None:
            self.observer(index, weights)
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._forward(hidden.to(torch.get_autocast_dtype(device_type)), index, weights).to(hidden.dtype)
        return self._forward(hidden, index, weights)

    def _forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        math = self.math()
        top_k = index.shape[1]
        experts = index.reshape(-1)
        trainable, here = self.trainable, self.resident
        if self.local is not None:
            experts = self.local[experts]
            trainable = None if trainable is None else trainable[self.local[:-1] < self.num_local]
            here = None  # what is absent has no place in the stacks
        # Routers limited to groups may pick absent experts, with weight 0: they must not run in a masked model either.
        chosen = here if trainable is None else trainable if here is None else trainable & here
        flat = weights.reshape(-1)
        groups = group_pairs(experts, self.num_local, top_k, chosen)
        if self.norms is None:
            out = self._grouped(math, hidden, flat, groups)
        else:
            rows = self._pairs(math, hidden, groups) * flat[groups.pair, None].to(hidden.dtype)
            self._report_norms(rows, groups, index.shape)
            out = hidden.new_zeros(hidden.shape).index_add(0, groups.token, rows)
        if trainable is not None and self.off_budget == "frozen":
            rest = group_pairs(experts, self.num_local, top_k, ~trainable if here is None else ~trainable & here)
            with torch.no_grad():
                rows = self._pairs(math, hidden, rest)
            # The gate still learns from experts over the budget; they themselves and what lies below them do not.
            out = out.index_add(0, rest.token, rows * flat[rest.pair, None].to(rows.dtype))
        return out

    def _grouped(self, math: ExpertMath, hidden: Tensor, flat: Tensor, groups: Groups) -> Tensor:
        if self.trained is None:
            return experts_forward(math, hidden, flat, groups, (), [])
        leaves = self.trained.of([expert for expert, _, _ in groups.spans])
        return experts_forward(math, hidden, flat, groups, self.trained.names, leaves)

    def _pairs(self, math: ExpertMath, hidden: Tensor, groups: Groups) -> Tensor:
        """The unweighted output of every pair [S, H]: each pair is treated as a token of its own."""
        own = torch.arange(groups.size, device=hidden.device)
        alone = Groups(groups.size, own, own, groups.spans, own[:, None])
        return self._grouped(math, hidden[groups.token], hidden.new_ones(groups.size), alone)

    def _report_norms(self, rows: Tensor, groups: Groups, shape: torch.Size) -> None:
        norms = torch.zeros(shape.numel(), device=rows.device)
        norms[groups.pair] = rows.detach().float().norm(dim=1)
        assert self.norms is not None
        self.norms(norms.view(shape))


def attach(model: Any, layers: list[MoELayer]) -> list[ExpertState]:
    """Let every MoE layer of `model` compute with our experts forward; returns the state of each.

    Raises:
        UnsupportedModelError: the experts of a layer are of a build that the forward does not know.
    """
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _registered_forward)
    states = []
    for layer in layers:
        state = ExpertState(layer)
        state.math()  # refuse now rather than in the first step
        object.__setattr__(layer.experts, STATE, state)
        if not state.stacked:
            # Families with a module per expert have no interface to register with: the instance gets its forward.
            object.__setattr__(layer.experts, "forward", _one_hot_forward(state))
        states.append(state)
    if any(state.stacked for state in states):
        model.set_experts_implementation(IMPLEMENTATION)
    return states


def _registered_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return getattr(module, STATE)(hidden, index, weights)


def _one_hot_forward(state: ExpertState) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of Switch Transformers' experts: one-hot dispatch [T, 1, E], all zero for tokens over capacity."""

    def forward(hidden: Tensor, dispatch: Tensor, weights: Tensor) -> Tensor:
        index = dispatch.argmax(dim=-1)
        index = index.masked_fill(dispatch.sum(dim=-1) == 0, state.layer.num_experts)
        return state(hidden, index, weights)

    return forward


def _stacked_math(experts: Any, scale: float) -> ExpertMath:
    name = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{name}: experts with a norm of their own are not supported")
    if not hasattr(experts, "is_transposed"):
        raise UnsupportedModelError(f"{name} does not use transformers' experts interface")
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    up_bias = down_bias = None
    if experts.has_bias:
        up_bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        down_bias = experts.down_proj_bias
    plain = experts.has_gate and getattr(experts._apply_gate, "__name__", "") == "_default_apply_gate"
    return ExpertMath(
        base=base_of(up.data, experts.down_proj.data, experts.is_transposed),
        gate=experts._apply_gate if experts.has_gate else experts.act_fn,
        silu_gate=plain and _is_silu(experts.act_fn),
        scale=scale,
        up_bias=None if up_bias is None else up_bias.data,
        down_bias=None if down_bias is None else down_bias.data,
        transposed=experts.is_transposed,
    )


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _listed_math(experts: nn.Module, scale: float) -> ExpertMath:
    members = _members(experts)
    up, down = zip(*(_linears(member) for member in members), strict=True)
    first = members[0]
    activation = next((getattr(first, n) for n in ("act", "act_fn", "activation_fn") if hasattr(first, n)), None)
    if activation is None or any(linear.bias is not None for linear in (*up, *down)):
        raise UnsupportedModelError(f"{type(first).__name__}: experts without an activation, or with biases")
    dropout = getattr(first, "dropout", None)
    return ExpertMath(
        base=SeparateBase(
            ListedWeights([linear.weight.data for linear in up]), ListedWeights([linear.weight.data for linear in down])
        ),
        gate=activation,
        scale=scale,
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and first.training else 0.0,
    )


def _members(experts: nn.Module) -> list[nn.Module]:
    return list(experts.children())


def _linears(member: nn.Module) -> list[nn.Linear]:
    linears = [child for child in member.children() if isinstance(child, nn.Linear)]
    if len(linears) != 2:
        raise UnsupportedModelError(f"{type(member).__name__}: expected an up and a down projection in each expert")
    return linears
